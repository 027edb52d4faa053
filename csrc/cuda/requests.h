// requests -- finds the rank of every request: the number of requests for the same expert that are
// served before it. The algorithm is known as multisplit.
//
// The requests of a group are in the order in which they are served. The requests are divided into
// chunks, one block per chunk. Each chunk is divided into runs, one warp per run. First every warp
// counts the requests of its run per expert, in its own counters in shared memory, without atomics.
// An expert's counts, summed over all earlier runs, are the rank of the first request for this
// expert in the run. With these ranks as counters, the warp then passes over its run again and gets
// the rank of every request. The warp keeps its run in registers, so it reads the run from memory
// only once.
#pragma once

#include "../common/slots.h"
#include "team.h"

namespace vmoe::cuda {
namespace {

constexpr int kMostWarps = 8;
constexpr int kTurns = 8;  // most requests of a run per lane
constexpr int64_t kRun = kTurns * kWarp;

struct Requests {
  const int32_t* expert;  // [T, K]  of one group
  const int32_t* order;   // [T]  the tokens in the order in which they are served; null: by index
  int64_t tokens, K, E;

  // The id, t * K + k, of the i-th request to be served.
  __device__ int32_t id(int64_t i) const {
    const auto of_all = static_cast<uint32_t>(i), size = static_cast<uint32_t>(tokens);
    const uint32_t k = of_all / size, t = of_all - k * size;  // ids fit in 32 bits
    return static_cast<int32_t>((order ? order[t] : t) * K + k);
  }
  // The expert that request `id` names, or -1 if it names no expert.
  __device__ int32_t expert_of(int32_t id) const {
    const int32_t e = expert[id];
    return e >= 0 && e < E ? e : -1;
  }
};

struct Shape : Slots {
  int64_t K, chunks;  // requests per token; chunks per group

  // Requests per warp, a multiple of 32: kRun if there are several chunks. A single chunk is
  // divided into equal runs.
  __device__ int64_t run() const {
    if (chunks > 1) return kRun;
    return ceil_div(tokens * K, blockDim.x) * kWarp;
  }
};

// The chunk of this block, and the run [begin, end) of this warp.
struct Chunk {
  int64_t group, chunk, begin, end;

  __device__ explicit Chunk(const Shape& shape) {
    group = blockIdx.x / shape.chunks;
    chunk = blockIdx.x % shape.chunks;
    const int64_t all = shape.tokens * shape.K, run = shape.run();
    const int64_t first = (chunk * blockDim.x + threadIdx.x) / kWarp * run;
    begin = first < all ? first : all;
    end = begin + run < all ? begin + run : all;
  }
};

// The run of this warp. Lane i has the requests i, i + 32, ...
struct Run {
  int32_t id[kTurns], expert[kTurns];  // -1: no request; no expert
  int turns;

  __device__ Run(const Requests& requests, const Chunk& at)
      : turns(static_cast<int>(ceil_div(at.end - at.begin, kWarp))) {
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      const int64_t i = at.begin + turn * kWarp + threadIdx.x % kWarp;
      id[turn] = i < at.end ? requests.id(i) : -1;
    }
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      expert[turn] = id[turn] < 0 ? -1 : requests.expert_of(id[turn]);
    }
  }

  // Adds the requests to counts [E]. Calls visit(id, expert, rank) for every request, where rank is
  // counts[expert] before the request.
  template <typename Visit>
  __device__ void count(int32_t* counts, Visit&& visit) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int turn = 0; turn < kTurns; ++turn) {
      if (turn == turns) break;
      const int32_t e = expert[turn];
      const unsigned same = __match_any_sync(kAllLanes, e);
      const int32_t before = e < 0 ? 0 : counts[e];
      __syncwarp();  // all lanes have read counts
      const int rank = __popc(same & ((1u << lane) - 1));
      if (e >= 0 && rank == 0) counts[e] = before + __popc(same);
      __syncwarp();
      if (id[turn] >= 0) visit(id[turn], e, before + rank);
    }
  }
};

// Counts the runs of all warps of the block: counts [warps, E], in shared memory.
__device__ void count_chunk(const Run& run, int64_t E, int32_t* counts) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t i = threadIdx.x; i < warps * E; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  run.count(counts + threadIdx.x / kWarp * E, [](int32_t, int32_t, int32_t) {});
  __syncthreads();
}

__device__ Requests
requests_of(const int32_t* expert, const int32_t* order, int64_t g, const Shape& shape) {
  return {
      expert + g * shape.tokens * shape.K, order ? order + g * shape.tokens : nullptr, shape.tokens,
      shape.K, shape.E};
}

// Counts the requests of every chunk per expert, if a group has several chunks.
__global__ void __launch_bounds__(kMostWarps* kWarp) count_kernel(
    const int32_t* __restrict__ expert,  // [G, T, K]
    const int32_t* __restrict__ order,   // [G, T] or null
    int32_t* __restrict__ counted,       // [G, chunks, E]
    Shape shape) {
  int32_t* counts = dynamic_shared<int32_t>();  // [warps, E]
  const Chunk at(shape);
  count_chunk(Run(requests_of(expert, order, at.group, shape), at), shape.E, counts);
  for (int64_t e = threadIdx.x; e < shape.E; e += blockDim.x) {
    int32_t total = 0;
    for (unsigned warp = 0; warp < blockDim.x / kWarp; ++warp) total += counts[warp * shape.E + e];
    counted[blockIdx.x * shape.E + e] = total;
  }
}

// Replaces counts [warps, E] by the rank of each warp's first request for every expert. Writes the
// number of requests of the group for every expert to total [E].
__device__ void add_up(
    const Shape& shape, const Chunk& at, const int32_t* counted, int32_t* counts, int32_t* total) {
  const unsigned warps = blockDim.x / kWarp;
  // Several lanes per expert add up the chunks, so that few loads wait for each other.
  int lanes = 1;
  while (shape.chunks > 1 && lanes < kWarp && 2 * lanes * shape.E <= blockDim.x) lanes *= 2;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  for (int64_t base = 0; base < shape.E; base += blockDim.x / lanes) {
    const int64_t e = base + threadIdx.x / lanes;
    const int32_t* of_chunk = counted + at.group * shape.chunks * shape.E + e;
    int32_t sum = 0, all = 0;
    for (int64_t chunk = lane; e < shape.E && shape.chunks > 1 && chunk < shape.chunks;
         chunk += lanes) {
      const int32_t count = of_chunk[chunk * shape.E];
      if (chunk < at.chunk) sum += count;
      all += count;
    }
    sum = join_lanes(sum, lanes, Sum{});
    all = join_lanes(all, lanes, Sum{});
    if (lane > 0 || e >= shape.E) continue;
    for (unsigned warp = 0; warp < warps; ++warp) {
      const int32_t count = counts[warp * shape.E + e];
      counts[warp * shape.E + e] = sum;
      sum += count;
    }
    total[e] = shape.chunks > 1 ? all : sum;
  }
  __syncthreads();
}

// Bytes of shared memory for the counts of `warps` warps and one total per expert.
int64_t shared_bytes(int64_t E, int64_t warps) {
  return (warps + 1) * E * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace
}  // namespace vmoe::cuda
