// A counting sort in four phases: count the slots of every token, add up to offsets, have every
// slot claim a place among its token's by an atomic, and rank it among those by comparing. The
// claims come in any order, the ranks in one: the result is the same every time. A token has few
// slots, so the ranks are cheap; many slots of one token are slower and right.
//
// A group that fits in shared memory is one block's and one launch; else a launch a phase.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "../invert_slots.h"
#include "launch.h"

namespace vmoe::cuda {
namespace {

constexpr int kThreads = 512;
using Scan = cub::BlockScan<int32_t, kThreads>;

// One group, and where its phases keep what they need. `step` threads, this one's number is `first`.
struct Group {
  const int32_t* token;  // [S]
  int32_t* offsets;      // [T + 1]
  int32_t* slots;        // [S]
  int32_t* next;         // [T]  where a token's next slot goes
  int32_t* claimed;      // [S]
  int64_t S, tokens, first, step;

  __device__ bool filled(int64_t s) const { return token[s] >= 0 && token[s] < tokens; }

  __device__ void count() const {
    for (int64_t s = first; s < S; s += step) {
      if (filled(s)) atomicAdd(&next[token[s]], 1);
    }
  }
  __device__ void claim() const {
    for (int64_t s = first; s < S; s += step) {
      if (filled(s)) claimed[atomicAdd(&next[token[s]], 1)] = static_cast<int32_t>(s);
    }
  }
  __device__ void rank() const {
    const int32_t total = offsets[tokens];
    for (int64_t i = first; i < S; i += step) {
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

  // By one block: offsets from the counts in `next`, which becomes where lists begin. kEach tokens a
  // thread, so that a long group does not wait for a barrier every kThreads of them.
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
    const int32_t* __restrict__ token,  // [G, S]
    int32_t* __restrict__ offsets,      // [G, T + 1]
    int32_t* __restrict__ slots,        // [G, S]
    int64_t S, int64_t tokens) {
  __shared__ typename Scan::TempStorage storage;
  int32_t* shared = dynamic_shared<int32_t>();  // [T + 1 + T + S]
  const int64_t g = blockIdx.x;
  const Group group{
      token + g * S, shared,      slots + g * S, shared + tokens + 1, shared + 2 * tokens + 1, S,
      tokens,        threadIdx.x, kThreads};
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

// `blocks` blocks a group, one for kAddUp.
template <Phase kPhase>
__global__ void __launch_bounds__(kThreads) phase_kernel(
    const int32_t* __restrict__ token, int32_t* __restrict__ offsets, int32_t* __restrict__ slots,
    int32_t* __restrict__ next,     // [G, T]  zeros at first
    int32_t* __restrict__ claimed,  // [G, S]
    int64_t S, int64_t tokens, int64_t blocks) {
  const int64_t g = blockIdx.x / blocks, block = blockIdx.x % blocks;
  const Group group{token + g * S,    offsets + g * (tokens + 1),
                    slots + g * S,    next + g * tokens,
                    claimed + g * S,  S,
                    tokens,           block * kThreads + threadIdx.x,
                    blocks * kThreads};
  if constexpr (kPhase == Phase::kCount) group.count();
  if constexpr (kPhase == Phase::kAddUp) {
    __shared__ typename Scan::TempStorage storage;
    group.add_up<16>(storage);
  }
  if constexpr (kPhase == Phase::kClaim) group.claim();
  if constexpr (kPhase == Phase::kRank) group.rank();
}

int64_t whole_bytes(int64_t S, int64_t tokens) {
  return (2 * tokens + 1 + S) * static_cast<int64_t>(sizeof(int32_t));
}

size_t run(
    const int32_t* token, int32_t* offsets, int32_t* slots, int64_t G, int64_t S, int64_t tokens,
    void* memory, bool measure, cudaStream_t stream) {
  // Beyond this one block takes longer than the launches of several.
  constexpr int64_t kLargestWhole = 100 << 10;
  const int64_t bytes = whole_bytes(S, tokens);
  Workspace workspace(memory);
  if (bytes <= std::min(kLargestWhole, shared_limit())) {
    if (measure) return 0;
    launch(
        whole_kernel, G, kThreads, static_cast<size_t>(bytes), stream, token, offsets, slots, S,
        tokens);
    return 0;
  }
  int32_t* next = workspace.take<int32_t>(G * tokens);
  int32_t* claimed = workspace.take<int32_t>(G * S);
  if (measure || G == 0) return workspace.size();
  cudaMemsetAsync(next, 0, static_cast<size_t>(G * tokens) * sizeof(int32_t), stream);
  const int64_t many = std::max<int64_t>(1, ceil_div(S, kThreads));
  const auto phase = [&](auto kernel, int64_t blocks) {
    launch(
        kernel, G * blocks, kThreads, 0, stream, token, offsets, slots, next, claimed, S, tokens,
        blocks);
  };
  phase(phase_kernel<Phase::kCount>, many);
  phase(phase_kernel<Phase::kAddUp>, 1);
  phase(phase_kernel<Phase::kClaim>, many);
  phase(phase_kernel<Phase::kRank>, many);
  return workspace.size();
}

}  // namespace

size_t invert_slots_workspace(int64_t G, int64_t S, int64_t tokens) {
  return run(nullptr, nullptr, nullptr, G, S, tokens, nullptr, true, nullptr);
}

void invert_slots(
    const int32_t* token, int32_t* offsets, int32_t* slots, int64_t G, int64_t S, int64_t tokens,
    void* workspace, CUstream_st* stream) {
  run(token, offsets, slots, G, S, tokens, workspace, false, stream);
}

}  // namespace vmoe::cuda
