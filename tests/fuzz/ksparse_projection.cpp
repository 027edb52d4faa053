#include "ksparse_projection.h"

#include <cmath>

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const int64_t N = in.integer(0, 4), n = in.integer(1, 90), k = in.integer(1, n);
  Block<T> x = in.values<T>(N * n), grad = in.values<T>(N * n), out(N * n), grad_x(N * n);
  kernels::ksparse_projection<T>(x, out, n, k, 0, N);
  for (int64_t row = 0; row < N; ++row) {
    int64_t support = 0;
    for (int64_t i = row * n; i < (row + 1) * n; ++i) support += out[i] > 0;
    expect(support <= k);
  }
  kernels::ksparse_projection_backward<T>(grad, out, grad_x, n, 1, 0, N);
  kernels::ksparse_projection_backward<T>(grad, x, grad_x, N, n, 0, 1);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
