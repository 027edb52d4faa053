// simplex -- the threshold of a projection onto the simplex, for the two ksparse ops.
#pragma once

#include <cstdint>

#include "select.h"

namespace vmoe::cpu::VMOE_ISA {

// The projection's threshold for the k picks of `value`, which are in order, with
// entries read as (value[...] - largest) / scale: relative to the largest, nothing
// is lost to cancellation where all are large. An entry's share is then
// max((value - largest) / scale - tau, 0). NaN where the largest is not finite.
// In float64. There is at least one pick.
template <typename T>
double simplex_threshold(
    const T* value, double scale, const std::vector<Pick<OrderKey<T>>>& picks) {
  const double largest = value[picks[0].index];
  double sum = 0, tau = 0;
  for (size_t r = 0; r < picks.size(); ++r) {
    const double u = (value[picks[r].index] - largest) / scale;
    sum += u;
    // rho is the last r for which this holds, and it holds for a prefix. Written
    // so that NaN makes tau NaN instead of leaving the loop.
    if (r > 0 && 1 + static_cast<double>(r + 1) * u <= sum) break;
    tau = (sum - 1) / static_cast<double>(r + 1);
  }
  return tau;
}

}  // namespace vmoe::cpu::VMOE_ISA
