// matrix -- loops of a block over the rows, entries or columns of a matrix [count, E].
#pragma once

#include "team.h"

namespace vmoe::cuda {

// Calls body(t, lane, width) for every row t < count on `lanes` adjacent lanes. `lanes` is a power
// of two. Lane j takes the entries j, j + lanes, ... of the row that are below `width` = E. All
// lanes of a warp call body, so that body may use join_lanes. Lanes without a row have t >= count
// and a width of 0.
template <typename Body>
__device__ void each_row(int64_t count, int64_t E, int lanes, Body&& body) {
  const int rows = static_cast<int>(blockDim.x) / lanes;
  const int row = static_cast<int>(threadIdx.x) / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int64_t begin = 0; begin < count; begin += rows) {
    const int64_t t = begin + row;
    body(t, lane, t < count ? E : 0);
  }
}

// Calls body(t, e) for every entry. Adjacent threads take adjacent entries.
template <typename Body>
__device__ void each_entry(int64_t count, int64_t E, Body&& body) {
  if (E == 0) return;
  const int64_t down = blockDim.x / E, across = blockDim.x % E;
  int64_t t = threadIdx.x / E, e = threadIdx.x % E;
  while (t < count) {
    body(t, e);
    t += down;
    e += across;
    if (e >= E) {
      e -= E;
      ++t;
    }
  }
}

// Reduces every column in a fixed order. `step` threads share a column. fold(e, first, step)
// reduces the rows first, first + step, ... of column e. out[e] is the join of the results of fold
// for first = 0, ..., step - 1. Ends with a barrier. `storage` has one number per thread.
template <typename Join, typename Fold>
__device__ void each_column(int64_t E, double* storage, double* out, Join join, Fold&& fold) {
  constexpr int kMostSegments = 32;
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (E > threads / 2) {
    for (int64_t e = tid; e < E; e += threads) out[e] = fold(e, 0, 1);
  } else if (E > 0) {
    const int width = static_cast<int>(E), column = tid % width, segment = tid / width;
    const int segments = threads / width < kMostSegments ? threads / width : kMostSegments;
    if (segment < segments) storage[tid] = fold(int64_t{column}, segment, segments);
    __syncthreads();
    if (segment == 0) {
      double joined = storage[column];
#pragma unroll 8  // loads that do not wait for the sums before them
      for (int i = 1; i < segments; ++i) joined = join(joined, storage[i * width + column]);
      out[column] = joined;
    }
  }
  __syncthreads();
}

// Lanes per row for `count` rows in shared memory: the largest number with which the block computes
// all rows at the same time, but at most one lane per entry and at most a warp.
inline int lanes_of_rows(int64_t count, int64_t E, int threads) {
  int lanes = 1;
  while (lanes < kWarp && 2 * lanes <= E && 2 * lanes * count <= threads) lanes *= 2;
  return lanes;
}

// Lanes per row for rows in device memory: one per entry, at most a warp. Adjacent lanes then read
// adjacent memory.
inline int lanes_of_rows(int64_t E) {
  int lanes = 1;
  while (lanes < kWarp && lanes < E) lanes *= 2;
  return lanes;
}

// Entries from row to row in shared memory. An odd multiple of the lanes avoids bank conflicts
// between the rows of a warp. If a row takes a whole warp, a warp has only one row, so there are no
// conflicts.
inline int64_t stride_of_rows(int64_t E, int lanes) {
  if (lanes == kWarp) return E;
  const int64_t pieces = ceil_div(E, lanes);
  return (pieces | 1) * lanes;
}

}  // namespace vmoe::cuda
