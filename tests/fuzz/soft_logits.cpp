#include "soft_logits.h"

#include "input.h"

namespace vmoe {

template <typename T>
void fuzz(Input& in, T) {
  const int64_t rows = in.integer(0, 9), D = in.integer(0, 70), S = in.integer(0, 70);
  Block<T> x = in.values<T>(rows * D), products = in.values<T>(rows * S), scaled(rows * S);
  Block<T> grad = in.values<T>(rows * D);
  kernels::soft_logits<T>(x, products, scaled, D, S, 0, rows);
  kernels::soft_logits_backward<T>(x, grad, D, 0, rows);
}

}  // namespace vmoe

VMOE_FUZZ(fuzz)
