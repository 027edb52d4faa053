// sort -- sorts whole rows in the order of order.h by CUB; for axes too long for a block's memory.
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

// The indices of every row of x [rows, n] in order, as a piece of the workspace. CUB's radix
// sort is stable, so ties stay in order of index. An error of CUB is thrown here: CUB returns it and
// takes it out of the runtime, where the caller asks for the errors of launches.
template <typename T>
const int32_t* sort_rows(
    const T* x, int64_t rows, int64_t n, Workspace& workspace, bool run, cudaStream_t stream) {
  using Key = OrderKey<T>;
  Key* keys = workspace.take<Key>(rows * n);
  Key* sorted_keys = workspace.take<Key>(rows * n);
  int32_t* indices = workspace.take<int32_t>(rows * n);
  int32_t* sorted = workspace.take<int32_t>(rows * n);
  int64_t* boundaries = workspace.take<int64_t>(rows + 1);
  if (run) {
    constexpr int kThreads = 256;
    const int64_t blocks = ceil_div(rows * n + 1, kThreads);
    launch(
        sort_prepare_kernel<T>, blocks < (1 << 20) ? blocks : 1 << 20, kThreads, 0, stream, x, keys,
        indices, boundaries, rows, n);
  }
  // CUB counts the entries of segments in 32 bits: so many rows at a time.
  const int64_t most = std::min(rows, std::max<int64_t>(1, INT32_MAX / n));
  const auto sort = [&](void* memory, size_t& size, int64_t begin, int64_t count) {
    constexpr int kBits = 8 * sizeof(Key);
    const int64_t at = begin * n;
    cudaError_t error;
    if (rows == 1) {
      error = cub::DeviceRadixSort::SortPairsDescending(
          memory, size, keys, sorted_keys, indices, sorted, n, 0, kBits, stream);
    } else {
      error = cub::DeviceSegmentedRadixSort::SortPairsDescending(
          memory, size, keys + at, sorted_keys + at, indices + at, sorted + at,
          static_cast<int>(count * n), static_cast<int>(count), boundaries, boundaries + 1, 0,
          kBits, stream);
    }
    if (error != cudaSuccess) {
      throw std::runtime_error(std::string("CUB's sort failed: ") + cudaGetErrorString(error));
    }
  };
  size_t size = 0;
  sort(nullptr, size, 0, most);
  char* memory = workspace.take<char>(static_cast<int64_t>(size));
  for (int64_t begin = 0; run && begin < rows; begin += most) {
    sort(memory, size, begin, std::min(most, rows - begin));
  }
  return sorted;
}

}  // namespace
}  // namespace vmoe::cuda
