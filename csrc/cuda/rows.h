// rows -- for kernels that move whole rows: a warp a row, pieces of 16 bytes where rows and
// pointers allow it.
#pragma once

#include "half.h"

namespace vmoe::cuda {

constexpr int kRowThreads = 256;

__device__ inline int64_t row_of_warp() {
  return (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) / kWarp;
}
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

inline int64_t blocks_of_rows(int64_t rows) { return ceil_div(rows * kWarp, kRowThreads); }

// Whether rows of D entries behind all these pointers can be read in pieces of 16 bytes.
template <typename Row, typename... Rows>
bool in_wide_pieces(int64_t D, const Rows*... rows) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return D % kWideEntries<Row> == 0 && (aligned(rows) && ...);
}

}  // namespace vmoe::cuda
