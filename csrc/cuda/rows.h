// rows -- helpers of kernels that read and write whole rows, one warp per row. Accesses are 16
// bytes wide ("wide") if the sizes and addresses of the rows allow it.
#pragma once

#include "half.h"

namespace vmoe::cuda {

constexpr int kRowThreads = 256;

__device__ inline int64_t row_of_warp() {
  return (int64_t{blockIdx.x} * kRowThreads + threadIdx.x) / kWarp;
}
__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x) % kWarp; }

inline int64_t blocks_of_rows(int64_t rows) { return ceil_div(rows * kWarp, kRowThreads); }

// Whether contiguous rows of D entries at all these addresses allow accesses of 16 bytes.
template <typename Row, typename... Rows>
bool in_wide_pieces(int64_t D, const Rows*... rows) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return D % kWideEntries<Row> == 0 && (aligned(rows) && ...);
}

// Loads entries [at, at + kWideEntries) of a row of n entries. Entries from n on are `otherwise`.
// With `wide` this is a single load of 16 bytes, which may also read memory after the end of the
// row.
template <typename T, typename Index>
__device__ Wide<T> load_entries(
    const T* row, Index at, std::type_identity_t<Index> n, bool wide, T otherwise) {
  Wide<T> piece = {};
  if (wide && at < n) piece = *reinterpret_cast<const Wide<T>*>(row + at);
#pragma unroll
  for (int i = 0; i < kWideEntries<T>; ++i) {
    if (at + i >= n) {
      piece.entry[i] = otherwise;
    } else if (!wide) {
      piece.entry[i] = row[at + i];
    }
  }
  return piece;
}

// Rounds `from` to Row and stores it to entries [at, at + kWideEntries) of a row of n entries. With
// `wide` this is a single store, which may also write memory after the end of the row.
template <typename Row>
__device__ void store_entries(
    Row* row, int64_t at, int64_t n, bool wide, const Wide<Compute<Row>>& from) {
  constexpr int kEntries = kWideEntries<Compute<Row>>;
  Piece<Row, kEntries> piece;
#pragma unroll
  for (int i = 0; i < kEntries; ++i) piece.entry[i] = narrow<Row>(from.entry[i]);
  if (wide) {
    if (at < n) store_piece<kEntries>(row, at / kEntries, piece);
    return;
  }
#pragma unroll
  for (int i = 0; i < kEntries; ++i) {
    if (at + i < n) row[at + i] = piece.entry[i];
  }
}

// Whether load_entries and store_entries may be `wide` on rows that begin `stride` entries apart.
template <typename T>
bool rows_are_wide(const T* rows, int64_t stride) {
  return stride % kWideEntries<T> == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
}

}  // namespace vmoe::cuda
