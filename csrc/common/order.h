// order -- the order of entries in every selection, on every device.
//
// Larger values come first. NaN comes before all other values, as in torch.sort with
// descending=True. +0 and -0 tie. Ties go to the lower index, which torch.topk does not guarantee.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VMOE_HOST_DEVICE __host__ __device__
#else
#define VMOE_HOST_DEVICE
#endif

namespace vmoe {

// An entry of a selection: the key of its value (order_key), and its index.
template <typename Key>
struct Pick {
  Key key;
  int32_t index;

  // Whether this entry comes before `other`.
  VMOE_HOST_DEVICE bool before(const Pick& other) const {
    return key > other.key || (key == other.key && index < other.index);
  }
};

// Converts a value to an unsigned integer, its key. The value with the larger key comes first.
// Values with equal keys tie. Comparisons of keys need no case for NaN. Keys are larger than 0.
VMOE_HOST_DEVICE inline uint32_t order_key(float value) {
  if (value != value) return UINT32_MAX;
  value += 0.0f;  // turns -0 into +0, so that they tie
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  // Read as integers, the bits ascend with positive values and descend with negative values.
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

VMOE_HOST_DEVICE inline uint64_t order_key(double value) {
  if (value != value) return UINT64_MAX;
  value += 0.0;
  uint64_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits >> 63 ? ~bits : bits | (uint64_t{1} << 63);
}

template <typename T>
using OrderKey = decltype(order_key(T{}));

}  // namespace vmoe
