// simplex -- the threshold of a projection onto the simplex, for the two ksparse ops.
#pragma once

#include <cstdint>

#include "select.h"

namespace vmoe::cpu {

// tau of ksparse_projection.h for the k picks of `value`, which are in order.
// Entries are read as value[...] / scale. Sums in float64.
template <typename T>
double simplex_threshold(
    const T* value, double scale, const std::vector<Pick<OrderKey<T>>>& picks) {
  double sum = 0, tau = 0;
  for (size_t r = 0; r < picks.size(); ++r) {
    const double u = value[picks[r].index] / scale;
    sum += u;
    // rho is the last r for which this holds, and it holds for a prefix. Written
    // so that NaN and +inf make tau NaN instead of leaving the loop.
    if (r > 0 && 1 + static_cast<double>(r + 1) * u <= sum) break;
    tau = (sum - 1) / static_cast<double>(r + 1);
  }
  return tau;
}

}  // namespace vmoe::cpu
