// device_segmented_radix_sort -- cub::DeviceSegmentedRadixSort as far as the kernels use it.
#pragma once

#include <cub/device/device_radix_sort.cuh>

namespace cub {

struct DeviceSegmentedRadixSort {
  template <typename Key, typename Value, typename Offset>
  static cudaError_t SortPairsDescending(
      void* storage, size_t& size, const Key* keys, Key* sorted_keys, const Value* values,
      Value* sorted_values, int64_t, int64_t segments, const Offset* begins, const Offset* ends,
      int = 0, int = 8 * sizeof(Key), cudaStream_t = nullptr) {
    if (!storage) return size = 1, cudaSuccess;
    for (int64_t s = 0; s < segments; ++s) {
      const Offset at = begins[s];
      DeviceRadixSort::SortPairsDescending(
          storage, size, keys + at, sorted_keys + at, values + at, sorted_values + at,
          ends[s] - at);
    }
    return cudaSuccess;
  }
};

}  // namespace cub
