// infinity -- the special values of float64, under one name on every device.
#pragma once

#include <limits>

namespace vmoe {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kUndefined = std::numeric_limits<double>::quiet_NaN();

}  // namespace vmoe
