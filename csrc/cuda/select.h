// select -- the first k entries of a row in the order of common/order.h ("picks"), by a warp or a
// block.
//
// Key 0 marks a position without an entry. No entry has key 0: the smallest key of an entry is the
// key of -inf, which is larger than 0.
#pragma once

#include <bit>
#include <cub/block/block_scan.cuh>

#include "../common/order.h"
#include "launch.h"

namespace vmoe::cuda {

// A position without an entry, which comes after every entry.
template <typename Key>
__device__ Pick<Key> no_pick() {
  return {0, INT32_MAX};
}

// Whether `a` comes before `b` (Pick::before), without a branch.
template <typename Key>
__device__ bool precedes(const Pick<Key>& a, const Pick<Key>& b) {
  return (a.key > b.key) | ((a.key == b.key) & (a.index < b.index));
}

// The first of the picks of kLanes adjacent lanes, one pick per lane. All lanes get the result.
template <int kLanes, typename Key>
__device__ Pick<Key> first_of_lanes(Pick<Key> pick) {
  if constexpr (kLanes == kWarp && sizeof(Key) == sizeof(unsigned)) {
    // Two warp reductions instead of a butterfly of ten shuffles.
    const Key key = __reduce_max_sync(kAllLanes, pick.key);
    const unsigned index = key == pick.key ? static_cast<unsigned>(pick.index) : INT32_MAX;
    return {key, static_cast<int32_t>(__reduce_min_sync(kAllLanes, index))};
  } else {
    for (int turn = kLanes / 2; turn > 0; turn /= 2) {
      const Pick<Key> other{
          __shfl_xor_sync(kAllLanes, pick.key, turn), __shfl_xor_sync(kAllLanes, pick.index, turn)};
      const bool first = precedes(other, pick);
      pick.key = first ? other.key : pick.key;
      pick.index = first ? other.index : pick.index;
    }
    return pick;
  }
}

constexpr int kFew = 16;

// Selects k <= kFew picks from a short row, whose keys are in the registers of kLanes lanes: kEach
// keys per lane, in runs of kTogether keys that are adjacent in memory. Round j finds the first
// remaining key of every lane. Pick j is the first among these keys.
template <typename Key, int kLanes, int kEach, int kTogether>
class Few {
 public:
  Key keys[kEach];

  static __device__ int lane() { return static_cast<int>(threadIdx.x % kLanes); }

  // Index in the row of this lane's keys[i]; ascending in i.
  static __device__ int32_t index(unsigned i) {
    return (i / kTogether * kLanes + threadIdx.x % kLanes) * kTogether + i % kTogether;
  }

  // Calls visit(j, pick) on all lanes for pick j = 0, ..., k - 1. All lanes of the warp must call
  // this function, with the same k.
  template <typename Visit>
  __device__ void select(int k, Visit&& visit) {
    int gone = kEach;  // the position in `keys` of the last pick, if it was a key of this lane
#pragma unroll 1
    for (int j = 0; j < k; ++j) {
      if (j > 0) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) keys[i] = i == gone ? Key{0} : keys[i];
      }
      Key key = 0;
      int at = kEach;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        at = keys[i] > key ? i : at;
        key = keys[i] > key ? keys[i] : key;
      }
      const int32_t own = index(at);
      const Pick<Key> pick = first_of_lanes<kLanes>(Pick<Key>{key, own});
      gone = pick.index == own ? at : kEach;
      visit(j, pick);
    }
  }
};

// Sorts `size` picks in shared memory by a bitonic sort. `size` is a power of two. If the step of a
// stage is at most 32, the stage exchanges picks only between the threads of a warp, because 32
// adjacent pairs are 64 adjacent picks. So two such stages need no barrier of the block between
// them.
template <typename Key>
__device__ void sort_picks(Pick<Key>* picks, int size) {
  int before = kWarp + 1;  // the step of the stage before; the first stage waits for all threads
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      if (step > kWarp || before > kWarp) {
        __syncthreads();
      } else {
        __syncwarp();
      }
      before = step;
      for (int pair = static_cast<int>(threadIdx.x); pair < size / 2;
           pair += static_cast<int>(blockDim.x)) {
        const int i = pair / step * step * 2 + pair % step, j = i + step;
        const bool ascending = (i & run) == 0;
        const Pick<Key> a = picks[i], b = picks[j];
        if (precedes(b, a) == ascending) {
          picks[i] = b;
          picks[j] = a;
        }
      }
    }
  }
  __syncthreads();
}

// Selects the first k of n entries, 1 <= k <= n, in order, by a block of kThreads threads. The
// block finds a cut: a key such that the entries with larger or equal keys include all k picks, and
// fit in `places` positions in shared memory. These entries are then sorted. If too many keys tie
// with the k-th, only the first of these keys are taken. The cut is found digit by digit, from the
// highest bit in which the keys differ, by a histogram of the digit.
template <typename Key, int kThreads>
class BlockSelect {
  static constexpr int kEach = 2;  // bins per thread
  static constexpr int kBins = kEach * kThreads, kBits = 31 - std::countl_zero(unsigned{kBins});
  using Scan = cub::BlockScan<int32_t, kThreads>;

 public:
  struct Storage {
    typename Scan::TempStorage scan;
    int32_t bins[kBins];
    Key differ[kThreads / kWarp];
    int32_t digit, above, count, taken;
  };

  // picks [places]: shared memory; its first k picks are the result. places is a power of two, at
  // least k. Entry i < n has the key given(i) and the index index_at(i). Among equal keys, indices
  // ascend with i. Any thread may call the two functions, any number of times. `keys` is memory for
  // n keys if `room` is true: the keys are stored there instead of computed again.
  template <typename Given, typename IndexAt>
  static __device__ void select(
      Storage& storage, Pick<Key>* picks, int places, Key* keys, bool room, int64_t n, int64_t k,
      Given&& given, IndexAt&& index_at) {
    const int tid = static_cast<int>(threadIdx.x);
    const bool cuts = n > places, kept = cuts && room;
    const auto key_at = [&](int64_t i) { return kept ? keys[i] : given(i); };
    for (int i = tid; i < places; i += kThreads) picks[i] = no_pick<Key>();
    if (tid == 0) storage.taken = 0;
    Cut cut{0, 0, true};  // takes all entries
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
    // The order in which entries are taken is arbitrary. The entries are sorted below.
    const auto take = [&](int64_t i, Key key) {
      picks[atomicAdd(&storage.taken, 1)] = {key, index_at(i)};
    };
#pragma unroll 4
    for (int64_t i = tid; i < n; i += kThreads) {
      const Key key = key_at(i);
      if (key > cut.key || (cut.all && key == cut.key)) take(i, key);
    }
    // If only some of the entries with the key of the cut are picks, takes the first of these
    // entries.
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
  // With `all`, the picks are among the entries with keys >= `key`. Else the picks are the entries
  // with keys > `key` and the first `ties` entries with key `key`.
  struct Cut {
    Key key;
    int32_t ties;
    bool all;
  };

  // differ: the bits in which any of the keys that this thread has read differs from key_at(0). The
  // threads of the block together have read all keys.
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

    // `prefix`: the bits of the k-th key from bit `shift` on, which are known.
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
  // The bits of the key from `shift` on. Shifting by the whole width of a type is undefined.
  static __device__ Key above_shift(Key key, int shift) {
    return shift == 8 * static_cast<int>(sizeof(Key)) ? Key{0} : key >> shift;
  }
};

}  // namespace vmoe::cuda
