// sort -- sorts whole rows by CUB, in the order of common/order.h. Kernels use this sort if they
// pick more entries of a row than a block can sort.
#pragma once

#include <algorithm>
#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_segmented_radix_sort.cuh>
#include <stdexcept>
#include <string>

#include "../common/order.h"
#include "launch.h"

namespace vmoe::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(256) sort_prepare_kernel(
    const T* __restrict__ x,           // [rows, n]
    OrderKey<T>* __restrict__ keys,    // [rows, n]
    int32_t* __restrict__ indices,     // [rows, n]
    int64_t* __restrict__ boundaries,  // [rows + 1]
    int64_t rows, int64_t n) {
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  const int64_t first = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (int64_t i = first; i < rows * n; i += step) {
    keys[i] = order_key(x[i]);
    indices[i] = static_cast<int32_t>(i % n);
  }
  for (int64_t i = first; i <= rows; i += step) boundaries[i] = i * n;
}

// The memory of sort_rows for x [rows, n].
template <typename Key>
struct SortLayout {
  SortLayout() = default;
  SortLayout(int64_t rows, int64_t n, Workspace& workspace)
      : rows(rows),
        n(n),
        keys(workspace.take<Key>(rows * n)),
        sorted_keys(workspace.take<Key>(rows * n)),
        indices(workspace.take<int32_t>(rows * n)),
        sorted(workspace.take<int32_t>(rows * n)),
        boundaries(workspace.take<int64_t>(rows + 1)) {
    call_cub(nullptr, size, 0, rows_together(), nullptr);
    memory = workspace.take<char>(static_cast<int64_t>(size));
  }

  // Rows per call of CUB, which takes int32 for the number of entries of all segments.
  int64_t rows_together() const { return std::min(rows, std::max<int64_t>(1, INT32_MAX / n)); }

  // Sorts the rows [begin, begin + count). With null `memory` the function only sets `bytes` to the
  // memory that the sort needs. Throws if CUB fails. CUB clears the error of the runtime, so the
  // check after the launches would miss the failure.
  void call_cub(
      void* memory, size_t& bytes, int64_t begin, int64_t count, cudaStream_t stream) const {
    constexpr int kBits = 8 * sizeof(Key);
    const int64_t at = begin * n;
    cudaError_t error;
    if (rows == 1) {
      error = cub::DeviceRadixSort::SortPairsDescending(
          memory, bytes, keys, sorted_keys, indices, sorted, n, 0, kBits, stream);
    } else {
      error = cub::DeviceSegmentedRadixSort::SortPairsDescending(
          memory, bytes, keys + at, sorted_keys + at, indices + at, sorted + at,
          static_cast<int>(count * n), static_cast<int>(count), boundaries, boundaries + 1, 0,
          kBits, stream);
    }
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("CUB's sort failed: ") + cudaGetErrorString(error));
    }
  }

  int64_t rows = 0, n = 0;
  Key *keys = nullptr, *sorted_keys = nullptr;    // [rows, n]
  int32_t *indices = nullptr, *sorted = nullptr;  // [rows, n]
  int64_t* boundaries = nullptr;                  // [rows + 1]
  char* memory = nullptr;                         // [size]  scratch of CUB
  size_t size = 0;
};

// Writes the indices of every row of x [rows, n] to layout.sorted, by descending entries. CUB's
// radix sort is stable, so the indices of equal entries ascend.
template <typename T>
void sort_rows(const T* x, const SortLayout<OrderKey<T>>& layout, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const int64_t rows = layout.rows, n = layout.n, blocks = ceil_div(rows * n + 1, kThreads);
  launch(
      sort_prepare_kernel<T>, blocks < (1 << 20) ? blocks : 1 << 20, kThreads, 0, stream, x,
      layout.keys, layout.indices, layout.boundaries, rows, n);
  size_t size = layout.size;
  for (int64_t begin = 0; begin < rows; begin += layout.rows_together()) {
    layout.call_cub(
        layout.memory, size, begin, std::min(layout.rows_together(), rows - begin), stream);
  }
}

}  // namespace
}  // namespace vmoe::cuda
