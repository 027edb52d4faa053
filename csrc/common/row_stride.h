// row_stride -- rows of n entries that all begin at 16 bytes: so the tensor cores' products load them
// at their best, and kernels write them in pieces.
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
