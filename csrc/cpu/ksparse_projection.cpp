#include "../ksparse_projection.h"

#include <cmath>
#include <limits>

#include "simplex.h"

namespace vmoe::cpu::VMOE_ISA {

template <typename T>
void ksparse_projection(
    const T* x, T* out, int64_t n, int64_t k, int64_t row_begin, int64_t row_end) {
  std::vector<Pick<OrderKey<T>>> picks;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* value = x + row * n;
    T* p = out + row * n;
    std::fill(p, p + n, T{0});
    select(value, 1, n, k, picks);
    if (picks.empty()) continue;
    const double tau = simplex_threshold(value, 1, picks);
    if (std::isnan(tau)) std::fill(p, p + n, std::numeric_limits<T>::quiet_NaN());
    const double largest = value[picks[0].index];
    for (const auto& pick : picks) {
      const double share = value[pick.index] - largest - tau;
      if (share > 0) p[pick.index] = static_cast<T>(share);
    }
  }
}

template void ksparse_projection(const float*, float*, int64_t, int64_t, int64_t, int64_t);
template void ksparse_projection(const double*, double*, int64_t, int64_t, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
