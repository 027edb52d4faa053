// matrix -- how a block goes over some rows and all columns of a matrix.
#pragma once

#include "team.h"

namespace vmoe::cuda {

// Calls body(t, lane, width) for every row t < count, by `lanes` lanes side by side, a power of
// two: lane j has entries j, j + lanes, ... of `width` ones. Whole warps call it together, so that
// lanes may join: behind the last row the width is 0.
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

// Calls body(t, e) for every entry, threads side by side at entries side by side.
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

// out[e] = fold(e, first, step) joined over first = 0, ..., step - 1, in one order. A barrier is
// behind it. `storage` has room for a number a thread.
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
      for (int i = 1; i < segments; ++i) joined = join(joined, storage[i * width + column]);
      out[column] = joined;
    }
  }
  __syncthreads();
}

// Lanes of a row for `count` rows that lie in shared memory: threads enough, and no more.
inline int lanes_of_rows(int64_t count, int64_t E, int threads) {
  int lanes = 1;
  while (lanes < kWarp && 2 * lanes <= E && 2 * lanes * count <= threads) lanes *= 2;
  return lanes;
}

// Of rows in device memory: as wide as they are, for they are read in whole sectors.
inline int lanes_of_rows(int64_t E) {
  int lanes = 1;
  while (lanes < kWarp && lanes < E) lanes *= 2;
  return lanes;
}

// From row to row in shared memory, so that rows side by side, `lanes` lanes each, meet in no bank:
// an odd multiple of the lanes. A whole warp a row meets nobody.
inline int64_t stride_of_rows(int64_t E, int lanes) {
  if (lanes == kWarp) return E;
  const int64_t pieces = ceil_div(E, lanes);
  return (pieces | 1) * lanes;
}

}  // namespace vmoe::cuda
