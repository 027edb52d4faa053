// device_segmented_radix_sort -- the part of cub::DeviceSegmentedRadixSort that the kernels use.
#pragma once

#include <cub/device/device_radix_sort.cuh>

namespace cub {

struct DeviceSegmentedRadixSort {
  template <typename Key, typename Value, typename Offset>
  static cudaError_t SortPairsDescending(
      void* storage, size_t& size, const Key* keys, Key* sorted_keys, const Value* values,
      Value* sorted_values, int64_t count, int64_t segments, const Offset* begins,
      const Offset* ends, int = 0, int = 8 * sizeof(Key), cudaStream_t = nullptr) {
    if (!storage) return size = count, cudaSuccess;
    if (size < static_cast<size_t>(count)) return cudaErrorInvalidValue;
    for (int64_t s = 0; s < segments; ++s) {
      const Offset at = begins[s];
      const cudaError_t error = DeviceRadixSort::SortPairsDescending(
          storage, size, keys + at, sorted_keys + at, values + at, sorted_values + at,
          ends[s] - at);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
};

}  // namespace cub
