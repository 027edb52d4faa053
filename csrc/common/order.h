// order -- the one order of every selection, on every device.
//
// Larger value first, NaN before everything (as torch.sort), +0 and -0 equal,
// then the lower index. Stock torch.topk does not promise the last part.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define VMOE_HOST_DEVICE __host__ __device__
#else
#define VMOE_HOST_DEVICE
#endif

namespace vmoe {

// One candidate of a selection: `key` is the value mapped to an integer of the
// same order, so that comparing needs no case for NaN.
template <typename Key>
struct Pick {
  Key key;
  int32_t index;

  // True when this one is chosen before `other`.
  VMOE_HOST_DEVICE bool before(const Pick& other) const {
    return key > other.key || (key == other.key && index < other.index);
  }
};

VMOE_HOST_DEVICE inline uint32_t order_key(float value) {
  if (value != value) return UINT32_MAX;
  value += 0.0f;  // -0 becomes +0: the two tie
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  // IEEE bits grow with positive values and shrink with negative ones.
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
