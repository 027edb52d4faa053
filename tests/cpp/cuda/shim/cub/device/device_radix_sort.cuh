// device_radix_sort -- the part of cub::DeviceRadixSort that the kernels use.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace shim {

// The error that a sort returns. Tests set it. A query of the size of the memory succeeds.
inline cudaError_t sort_error = cudaSuccess;

}  // namespace shim

namespace cub {

struct DeviceRadixSort {
  template <typename Key, typename Value>
  static cudaError_t SortPairsDescending(
      void* storage, size_t& size, const Key* keys, Key* sorted_keys, const Value* values,
      Value* sorted_values, int64_t count, int = 0, int = 8 * sizeof(Key), cudaStream_t = nullptr) {
    if (!storage) return size = count, cudaSuccess;
    if (size < static_cast<size_t>(count)) return cudaErrorInvalidValue;
    if (shim::sort_error != cudaSuccess) return shim::sort_error;
    std::vector<int64_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(
        order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
    for (int64_t i = 0; i < count; ++i) {
      sorted_keys[i] = keys[order[i]];
      sorted_values[i] = values[order[i]];
    }
    return cudaSuccess;
  }
};

}  // namespace cub
