// infinity -- infinity and NaN in float64, for host and device code.
#pragma once

#include <limits>

namespace vmoe {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

}  // namespace vmoe
