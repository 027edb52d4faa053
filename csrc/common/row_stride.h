// row_stride -- the distance between rows of n entries, in entries, so that all rows are aligned to
// 16 bytes. Tensor-core products then load them fastest, and kernels store 16 bytes at once.
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
