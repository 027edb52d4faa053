// row_stride -- the distance from one row of n entries to the next, counted in entries. All rows
// are then aligned to 16 bytes. Tensor-core products load aligned rows fastest. Kernels store 16
// bytes of an aligned row at once.
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
