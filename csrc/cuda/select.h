// select -- the k first picks of a row, in the order of order.h, by a warp or a block.
//
// Key 0 is nobody's: the least key is that of -inf.
#pragma once

#include <cub/block/block_scan.cuh>

#include "../order.h"
#include "launch.h"

namespace vmoe::cuda {

// What comes after every candidate.
template <typename Key>
__device__ Pick<Key> no_pick() {
  return {0, INT32_MAX};
}

// The first of one pick a lane, among kLanes lanes; all of them get it.
template <int kLanes, typename Key>
__device__ Pick<Key> first_of_lanes(Pick<Key> pick) {
  if constexpr (kLanes == kWarp && sizeof(Key) == sizeof(unsigned)) {
    // Two instructions instead of a butterfly of ten shuffles.
    const Key key = __reduce_max_sync(kAllLanes, pick.key);
    const unsigned index = key == pick.key ? static_cast<unsigned>(pick.index) : INT32_MAX;
    return {key, static_cast<int32_t>(__reduce_min_sync(kAllLanes, index))};
  } else {
    for (int turn = kLanes / 2; turn > 0; turn /= 2) {
      const Pick<Key> other{
          __shfl_xor_sync(kAllLanes, pick.key, turn), __shfl_xor_sync(kAllLanes, pick.index, turn)};
      if (other.before(pick)) pick = other;
    }
    return pick;
  }
}

constexpr int kFew = 16;

// Few picks (k <= kFew) of few entries: kLanes lanes hold a row's keys in registers, kEach a lane,
// kTogether of them side by side in memory. A round is the best of every lane and of the lanes;
// lane j % kLanes keeps pick j, in picks[j / kLanes] and its key in picked[j / kLanes].
template <typename Key, int kLanes, int kEach, int kTogether>
class Few {
 public:
  static constexpr int kPicks = (kFew + kLanes - 1) / kLanes;

  Key keys[kEach];
  int32_t picks[kPicks] = {};
  Key picked[kPicks] = {};

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  // Where keys[i] of this lane is in the row. Grows with i.
  static __device__ int32_t index(int i) {
    return (i / kTogether * kLanes + lane()) * kTogether + i % kTogether;
  }

  // All lanes of the warp call this together, with one k.
  __device__ void select(int64_t k) {
#pragma unroll
    for (int j = 0; j < kFew; ++j) {
      if (j >= k) break;
      Pick<Key> best = no_pick<Key>();
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (keys[i] > best.key) best = {keys[i], index(i)};
      }
      best = first_of_lanes<kLanes>(best);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (index(i) == best.index) keys[i] = 0;
      }
      if (lane() == j % kLanes) {
        picks[j / kLanes] = best.index;
        picked[j / kLanes] = best.key;
      }
    }
  }
};

// How a row is cut: the picks are all keys above `key` and the first `ties` equal to it, or,
// with `all`, simply all keys from `key` on.
template <typename Key>
struct Cut {
  Key key;
  int32_t ties;
  bool all;
};

// Cuts n keys for 1 <= k <= n picks, by a histogram a digit from the first bit in which keys differ
// on: eight bits are mostly enough, as the first digit that is looked at tells keys apart. The
// block's threads, kThreads >= 256, call this together; key_at(i) is asked for by any of them.
template <typename Key, int kThreads>
class BlockCut {
  static constexpr int kBits = 8, kBins = 1 << kBits, kKeyBits = 8 * sizeof(Key);
  static_assert(kThreads >= kBins);
  using Scan = cub::BlockScan<int32_t, kThreads>;

 public:
  struct Storage {
    typename Scan::TempStorage scan;
    int32_t bins[kBins];
    Key differ[kThreads / kWarp];
    int32_t digit, above, count;
  };

  template <typename KeyAt>
  static __device__ Cut<Key> find(Storage& storage, int64_t n, int64_t k, KeyAt&& key_at) {
    const int tid = static_cast<int>(threadIdx.x);
    const Key some = key_at(0);
    Key differ = 0;
    for (int64_t i = tid; i < n; i += kThreads) differ |= key_at(i) ^ some;
    for (int turn = kWarp / 2; turn > 0; turn /= 2) {
      differ |= __shfl_xor_sync(kAllLanes, differ, turn);
    }
    __syncthreads();  // of an earlier use of the storage
    if (tid % kWarp == 0) storage.differ[tid / kWarp] = differ;
    __syncthreads();
    for (int warp = 0; warp < kThreads / kWarp; ++warp) differ |= storage.differ[warp];

    // Bits [shift, kKeyBits) of the k-th key are known, and equal those of `prefix`.
    int shift = bits_of(differ);
    Key prefix = above_shift(some, shift);
    auto missing = static_cast<int32_t>(k);
    for (;;) {
      if (shift == 0) return {prefix, missing, false};
      const int bits = shift < kBits ? shift : kBits;
      shift -= bits;
      if (tid < kBins) storage.bins[tid] = 0;
      __syncthreads();
      for (int64_t i = tid; i < n; i += kThreads) {
        const Key key = key_at(i);
        if (above_shift(key, shift + bits) != prefix) continue;
        atomicAdd(&storage.bins[key >> shift & ((Key{1} << bits) - 1)], 1);
      }
      __syncthreads();
      // From the largest digit down, until the k-th is passed.
      const int digit = kBins - 1 - tid;
      const int32_t count = tid < kBins ? storage.bins[digit] : 0;
      int32_t above;
      Scan(storage.scan).ExclusiveSum(count, above);
      if (above < missing && missing <= above + count) {
        storage.digit = digit;
        storage.above = above;
        storage.count = count;
      }
      __syncthreads();
      missing -= storage.above;
      prefix = prefix << bits | static_cast<Key>(storage.digit);
      if (storage.count == missing) return {prefix << shift, 0, true};
    }
  }

 private:
  static __device__ int bits_of(uint32_t value) { return 32 - __clz(static_cast<int>(value)); }
  static __device__ int bits_of(uint64_t value) {
    return 64 - __clzll(static_cast<long long>(value));
  }
  // Shifting by all the bits there are is undefined.
  static __device__ Key above_shift(Key key, int shift) {
    return shift == kKeyBits ? Key{0} : key >> shift;
  }
};

// Sorts `size` picks, a power of two, in shared memory.
template <typename Key>
__device__ void sort_picks(Pick<Key>* picks, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int pair = static_cast<int>(threadIdx.x); pair < size / 2;
           pair += static_cast<int>(blockDim.x)) {
        const int i = pair / step * step * 2 + pair % step, j = i + step;
        const bool ascending = (i & run) == 0;
        const Pick<Key> a = picks[i], b = picks[j];
        if (b.before(a) == ascending) {
          picks[i] = b;
          picks[j] = a;
        }
      }
    }
  }
  __syncthreads();
}

}  // namespace vmoe::cuda
