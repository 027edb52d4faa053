#include "topk.h"

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const int64_t N = in.integer(0, 3), n = in.integer(0, 90), M = in.integer(1, 20),
                k = in.integer(0, n);
  Block<T> x = in.values<T>(N * n * M);
  Block<T> values(N * M * k);
  Block<int32_t> indices(N * M * k);
  kernels::topk<T>(x, values, indices, n, M, k, 0, N * M);
  for (const int32_t index : indices) expect(index >= 0 && index < n);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
