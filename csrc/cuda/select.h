// select -- the first k picks of a row, in the order of order.h, by a warp or a block.
//
// Key 0 marks an empty place. No value has it: the least key is the key of -inf, which is above 0.
#pragma once

#include <bit>
#include <cub/block/block_scan.cuh>

#include "../common/order.h"
#include "launch.h"

namespace vmoe::cuda {

// An empty place, which comes after every candidate.
template <typename Key>
__device__ Pick<Key> no_pick() {
  return {0, INT32_MAX};
}

// The first among kLanes lanes' picks, one pick per lane; all lanes get it.
template <int kLanes, typename Key>
__device__ Pick<Key> first_of_lanes(Pick<Key> pick) {
  if constexpr (kLanes == kWarp && sizeof(Key) == sizeof(unsigned)) {
    // Two reductions instead of a butterfly of ten shuffles.
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

// Selects k <= kFew picks from a short row. kLanes lanes hold the row's keys in registers, kEach
// keys per lane, of which each kTogether are adjacent in memory. Each round finds the first key of
// every lane and then the first among the lanes. Lane j % kLanes keeps pick j in picks[j / kLanes]
// and its key in picked[j / kLanes].
template <typename Key, int kLanes, int kEach, int kTogether>
class Few {
 public:
  static constexpr int kPicks = (kFew + kLanes - 1) / kLanes;

  Key keys[kEach];
  int32_t picks[kPicks] = {};
  Key picked[kPicks] = {};

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

  // Index in the row of this lane's keys[i]; ascending in i.
  static __device__ int32_t index(int i) {
    return (i / kTogether * kLanes + lane()) * kTogether + i % kTogether;
  }

  // All lanes of the warp call this together with the same k.
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

// Sorts `size` picks in shared memory; size is a power of two. (A bitonic sort.)
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

// The first k of n picks, 1 <= k <= n, in order, by a block of kThreads. Histograms of one digit of
// the keys at a time, from the highest bit in which the keys differ, find a key to cut at, until
// the candidates from the cut on fit in the `places` in shared memory, which are then sorted. One
// digit is usually enough.
template <typename Key, int kThreads>
class BlockSelect {
  static constexpr int kEach = 2;  // bins of a thread
  static constexpr int kBins = kEach * kThreads, kBits = 31 - std::countl_zero(unsigned{kBins});
  using Scan = cub::BlockScan<int32_t, kThreads>;

 public:
  struct Storage {
    typename Scan::TempStorage scan;
    int32_t bins[kBins];
    Key differ[kThreads / kWarp];
    int32_t digit, above, count, taken;
  };

  // picks [places]: scratch, whose first k entries are the result; places is a power of two, at
  // least k. Pick i < n has the key given(i) and the index index_at(i), ascending in i among equal
  // keys. Any thread may call these two, and several times. With `room`, `keys` [n] keeps the keys
  // after the first call of given.
  template <typename Given, typename IndexAt>
  static __device__ void select(
      Storage& storage, Pick<Key>* picks, int places, Key* keys, bool room, int64_t n, int64_t k,
      Given&& given, IndexAt&& index_at) {
    const int tid = static_cast<int>(threadIdx.x);
    const bool cuts = n > places, kept = cuts && room;
    const auto key_at = [&](int64_t i) { return kept ? keys[i] : given(i); };
    for (int i = tid; i < places; i += kThreads) picks[i] = no_pick<Key>();
    if (tid == 0) storage.taken = 0;
    Cut cut{0, 0, true};  // takes all picks
    if (cuts) {
      const Key some = given(0);
      Key differ = 0;
#pragma unroll 8
      for (int64_t i = tid; i < n; i += kThreads) {
        const Key key = given(i);
        if (kept) keys[i] = key;
        differ |= key ^ some;
      }
      __syncthreads();
      cut = find(storage, places, n, k, differ, key_at);
    }
    __syncthreads();
    // Takes picks in any order; they are sorted below.
    const auto take = [&](int64_t i, Key key) {
      picks[atomicAdd(&storage.taken, 1)] = {key, index_at(i)};
    };
#pragma unroll 4
    for (int64_t i = tid; i < n; i += kThreads) {
      const Key key = key_at(i);
      if (key > cut.key || (cut.all && key == cut.key)) take(i, key);
    }
    // More keys tie than fit: takes the first of them in order of index.
    int32_t before = 0;
    for (int64_t begin = 0; before < cut.ties; begin += kThreads) {
      const int64_t i = begin + tid;
      const bool ties = i < n && key_at(i) == cut.key;
      int32_t rank, count;
      Scan(storage.scan).ExclusiveSum(ties, rank, count);
      if (ties && before + rank < cut.ties) take(i, cut.key);
      before += count;
      __syncthreads();
    }
    sort_picks(picks, places);
  }

 private:
  // With `all`, the candidates are all keys >= `key`. Else the picks are all keys > `key` and the
  // first `ties` keys equal to it.
  struct Cut {
    Key key;
    int32_t ties;
    bool all;
  };

  // differ: the bits in which the keys that this thread has read differ from key_at(0). The threads
  // of the block have read all keys.
  template <typename KeyAt>
  static __device__ Cut
  find(Storage& storage, int places, int64_t n, int64_t k, Key differ, KeyAt&& key_at) {
    const int tid = static_cast<int>(threadIdx.x);
    const Key some = key_at(0);
    for (int turn = kWarp / 2; turn > 0; turn /= 2) {
      differ |= __shfl_xor_sync(kAllLanes, differ, turn);
    }
    if (tid % kWarp == 0) storage.differ[tid / kWarp] = differ;
    __syncthreads();
    for (int warp = 0; warp < kThreads / kWarp; ++warp) differ |= storage.differ[warp];

    // The bits of the k-th key from `shift` on are known; they are `prefix`.
    int shift = bits_of(differ);
    Key prefix = above_shift(some, shift);
    auto missing = static_cast<int32_t>(k);
    for (;;) {
      if (shift == 0) return {prefix, missing, false};
      const int bits = shift < kBits ? shift : kBits;
      shift -= bits;
#pragma unroll
      for (int i = 0; i < kEach; ++i) storage.bins[tid + i * kThreads] = 0;
      __syncthreads();
#pragma unroll 4
      for (int64_t i = tid; i < n; i += kThreads) {
        const Key key = key_at(i);
        if (above_shift(key, shift + bits) != prefix) continue;
        atomicAdd(&storage.bins[key >> shift & ((Key{1} << bits) - 1)], 1);
      }
      __syncthreads();
      // Counts from the largest digit down to the digit of the k-th key.
      int32_t counts[kEach], sum = 0, above;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += counts[i] = storage.bins[kBins - 1 - tid * kEach - i];
      Scan(storage.scan).ExclusiveSum(sum, above);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (above < missing && missing <= above + counts[i]) {
          storage.digit = kBins - 1 - tid * kEach - i;
          storage.above = above;
          storage.count = counts[i];
        }
        above += counts[i];
      }
      __syncthreads();
      missing -= storage.above;
      prefix = prefix << bits | static_cast<Key>(storage.digit);
      if (k - missing + storage.count <= places) return {prefix << shift, 0, true};
    }
  }

  static __device__ int bits_of(uint32_t value) { return 32 - __clz(static_cast<int>(value)); }
  static __device__ int bits_of(uint64_t value) {
    return 64 - __clzll(static_cast<long long>(value));
  }
  // A shift by the whole width of a type is undefined.
  static __device__ Key above_shift(Key key, int shift) {
    return shift == 8 * static_cast<int>(sizeof(Key)) ? Key{0} : key >> shift;
  }
};

}  // namespace vmoe::cuda
