// A counting sort in four phases:
//
//   count   counts the slots of every token
//   add_up  computes the offsets, which are the prefix sums of the counts
//   claim   gives every slot one of the positions of its token, by an atomic increment. The order
//           of a token's slots is arbitrary after this phase
//   rank    writes every slot to its final position: the offset of its token plus the number of
//           smaller slots of that token. The result is therefore deterministic
//
// Ranking compares all pairs of slots of a token. Ranking is fast because a token has few slots.
//
// A group that fits in shared memory takes one block. All groups then take one launch
// (whole_kernel). Larger groups take several blocks, and one launch per phase (phase_kernel).
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "../invert_slots.h"
#include "launch.h"

namespace vmoe::cuda {
namespace {

constexpr int kThreads = 512;
using Scan = cub::BlockScan<int32_t, kThreads>;

// One group, and the memory of its phases. `step` threads work on the group. `first` is the number
// of this thread among these threads.
struct Group {
  const int32_t* token;  // [E, C]
  int32_t* offsets;      // [T + 1]
  int32_t* slots;        // [S]
  int32_t* filled;       // [E] or null
  int32_t* next;         // [T]  counts of slots; after add_up the next position of the token
  int32_t* claimed;      // [S]  slots by token, in arbitrary order within a token
  int64_t E, C, tokens, first, step;

  __device__ int64_t size() const { return E * C; }
  __device__ bool is_filled(int64_t s) const { return token[s] >= 0 && token[s] < tokens; }

  // Writes `filled`. One warp per expert searches its slots from the last to the first.
  __device__ void find_last() const {
    const int64_t lane = first % kWarp;
    for (int64_t e = first / kWarp; filled && e < E; e += step / kWarp) {
      int64_t end = C;
      unsigned found = 0;
      for (; end > 0; end -= kWarp) {
        const int64_t c = end - 1 - lane;
        found = __ballot_sync(kAllLanes, c >= 0 && is_filled(e * C + c));
        if (found) break;
      }
      if (lane == 0) {
        filled[e] = found ? static_cast<int32_t>(end + 1 - __ffs(static_cast<int>(found))) : 0;
      }
    }
  }
  __device__ void count() const {
    for (int64_t s = first; s < size(); s += step) {
      if (is_filled(s)) atomicAdd(&next[token[s]], 1);
    }
  }
  __device__ void claim() const {
    for (int64_t s = first; s < size(); s += step) {
      if (is_filled(s)) claimed[atomicAdd(&next[token[s]], 1)] = static_cast<int32_t>(s);
    }
  }
  __device__ void rank() const {
    const int32_t total = offsets[tokens];
    for (int64_t i = first; i < size(); i += step) {
      if (i >= total) {
        slots[i] = -1;
        continue;
      }
      const int32_t s = claimed[i], t = token[s];
      int32_t place = offsets[t];
      for (int32_t j = offsets[t]; j < offsets[t + 1]; ++j) place += claimed[j] < s;
      slots[place] = s;
    }
  }

  // One block computes the offsets from the counts in `next`, and sets `next` to the offsets. A
  // thread adds up kEach tokens between barriers, so that many tokens need few barriers.
  template <int kEach>
  __device__ void add_up(Scan::TempStorage& storage) const {
    int32_t begun = 0;
    for (int64_t base = 0; base < tokens; base += kThreads * kEach) {
      const int64_t t = base + static_cast<int64_t>(threadIdx.x) * kEach;
      int32_t counts[kEach], sum = 0, before, total;
#pragma unroll
      for (int i = 0; i < kEach; ++i) sum += counts[i] = t + i < tokens ? next[t + i] : 0;
      Scan(storage).ExclusiveSum(sum, before, total);
      before += begun;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (t + i < tokens) offsets[t + i] = next[t + i] = before;
        before += counts[i];
      }
      begun += total;
      __syncthreads();
    }
    if (threadIdx.x == 0) offsets[tokens] = begun;
  }
};

__global__ void __launch_bounds__(kThreads) whole_kernel(
    const int32_t* __restrict__ token,  // [G, E, C]
    int32_t* __restrict__ offsets,      // [G, T + 1]
    int32_t* __restrict__ slots,        // [G, S]
    int32_t* __restrict__ filled,       // [G, E] or null
    Slots shape) {
  __shared__ typename Scan::TempStorage storage;
  int32_t* shared = dynamic_shared<int32_t>();  // [T + 1 + T + S]
  const int64_t g = blockIdx.x, S = shape.of_group(), tokens = shape.tokens;
  const Group group{
      token + g * S,
      shared,
      slots + g * S,
      filled ? filled + g * shape.E : nullptr,
      shared + tokens + 1,
      shared + 2 * tokens + 1,
      shape.E,
      shape.C,
      tokens,
      threadIdx.x,
      kThreads};
  group.find_last();
  for (int64_t t = threadIdx.x; t < tokens; t += kThreads) group.next[t] = 0;
  __syncthreads();
  group.count();
  __syncthreads();
  group.add_up<1>(storage);
  __syncthreads();
  group.claim();
  __syncthreads();
  group.rank();
  for (int64_t t = threadIdx.x; t <= tokens; t += kThreads) {
    offsets[g * (tokens + 1) + t] = shared[t];
  }
}

enum class Phase { kCount, kAddUp, kClaim, kRank };

// One phase, with `blocks` blocks per group (1 for kAddUp).
template <Phase kPhase>
__global__ void __launch_bounds__(kThreads) phase_kernel(
    const int32_t* __restrict__ token, int32_t* __restrict__ offsets, int32_t* __restrict__ slots,
    int32_t* __restrict__ filled,
    int32_t* __restrict__ next,     // [G, T]  zeros at first
    int32_t* __restrict__ claimed,  // [G, S]
    Slots shape, int64_t blocks) {
  const int64_t g = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const int64_t S = shape.of_group(), tokens = shape.tokens;
  const Group group{
      token + g * S,
      offsets + g * (tokens + 1),
      slots + g * S,
      filled ? filled + g * shape.E : nullptr,
      next + g * tokens,
      claimed + g * S,
      shape.E,
      shape.C,
      tokens,
      block * kThreads + threadIdx.x,
      blocks * kThreads};
  if constexpr (kPhase == Phase::kCount) {
    group.find_last();
    group.count();
  }
  if constexpr (kPhase == Phase::kAddUp) {
    __shared__ typename Scan::TempStorage storage;
    group.add_up<16>(storage);
  }
  if constexpr (kPhase == Phase::kClaim) group.claim();
  if constexpr (kPhase == Phase::kRank) group.rank();
}

// Bytes of shared memory of whole_kernel.
int64_t whole_bytes(const Slots& shape) {
  return (2 * shape.tokens + 1 + shape.of_group()) * static_cast<int64_t>(sizeof(int32_t));
}

// Whether one block computes a group. Groups of more than kLargest bytes take several blocks.
bool is_whole(const Slots& shape) {
  constexpr int64_t kLargest = 100 << 10;
  return whole_bytes(shape) <= std::min(kLargest, shared_limit());
}

struct Layout {
  Workspace workspace;
  int32_t* next;     // [G, T]
  int32_t* claimed;  // [G, S]

  Layout(void* memory, const Slots& shape)
      : workspace(memory),
        next(workspace.take<int32_t>(shape.all_tokens())),
        claimed(workspace.take<int32_t>(shape.all())) {}
};

}  // namespace

size_t invert_slots_workspace(const Slots& shape) {
  return is_whole(shape) ? 0 : Layout(nullptr, shape).workspace.size();
}

void invert_slots(
    const int32_t* token, int32_t* offsets, int32_t* slots, int32_t* filled, const Slots& shape,
    void* workspace, CUstream_st* stream) {
  if (is_whole(shape)) {
    launch(
        whole_kernel, shape.G, kThreads, static_cast<size_t>(whole_bytes(shape)), stream, token,
        offsets, slots, filled, shape);
    return;
  }
  if (shape.G == 0) return;
  const Layout layout(workspace, shape);
  cudaMemsetAsync(
      layout.next, 0, static_cast<size_t>(shape.all_tokens()) * sizeof(int32_t), stream);
  const int64_t many = std::max<int64_t>(1, ceil_div(shape.of_group(), kThreads));
  const auto phase = [&](auto kernel, int64_t blocks) {
    launch(
        kernel, shape.G * blocks, kThreads, 0, stream, token, offsets, slots, filled, layout.next,
        layout.claimed, shape, blocks);
  };
  phase(phase_kernel<Phase::kCount>, many);
  phase(phase_kernel<Phase::kAddUp>, 1);
  phase(phase_kernel<Phase::kClaim>, many);
  phase(phase_kernel<Phase::kRank>, many);
}

}  // namespace vmoe::cuda
