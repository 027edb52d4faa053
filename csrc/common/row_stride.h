// row_stride -- distance in entries between rows of n entries that all begin at multiples of 16
// bytes, as tensor-core products load fastest and kernels store in 16-byte pieces.
#pragma once

#include <cstdint>

#include "order.h"

namespace vmoe {

template <typename T>
VMOE_HOST_DEVICE constexpr int64_t row_stride(int64_t n) {
  constexpr int64_t entries = 16 / sizeof(T);
  return (n + entries - 1) / entries * entries;
}

}  // namespace vmoe
