#include "../topk.h"

#include "select.h"

namespace vmoe::cpu::VMOE_ISA {

template <typename T>
void topk(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t M, int64_t k, int64_t row_begin,
    int64_t row_end) {
  std::vector<Pick<OrderKey<T>>> picks;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* column = x + (row / M) * n * M + row % M;
    select(column, M, n, k, picks);
    for (int64_t j = 0; j < k; ++j) {
      values[row * k + j] = column[picks[j].index * M];
      indices[row * k + j] = picks[j].index;
    }
  }
}

template void topk(const float*, float*, int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t);
template void topk(const double*, double*, int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
