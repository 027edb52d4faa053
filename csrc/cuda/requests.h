// requests -- finds the rank of every request: the number of requests for the same expert that are
// served before it. (A multisplit.)
//
// The requests of a group are in the order in which they are served. They are divided into chunks,
// one block per chunk, and each chunk into runs, one warp per run. First every warp counts the
// requests of its run per expert, in its own counters in shared memory, without atomics. The sum of
// the counts of all earlier runs is the rank of its first request for each expert. With these ranks
// as counters, the warp then passes over its run again and gets the rank of every request.
#pragma once

#include "../common/slots.h"
#include "launch.h"

namespace vmoe::cuda {
namespace {

constexpr int kMostWarps = 8;
constexpr int64_t kRun = 256;  // requests per warp

struct Requests {
  const int32_t* expert;  // [T, K]  of one group
  const int32_t* order;   // [T]  the tokens in the order in which they are served; null: by index
  int64_t tokens, K, E;

  // The id, t * K + k, of the i-th request to be served.
  __device__ int32_t id(int64_t i) const {
    const int64_t k = i / tokens, t = i % tokens;
    return static_cast<int32_t>((order ? order[t] : t) * K + k);
  }
  // The requested expert, or -1 if `id` requests none.
  __device__ int32_t expert_of(int32_t id) const {
    const int32_t e = expert[id];
    return e >= 0 && e < E ? e : -1;
  }
};

// Adds the requests [begin, end), the run of this warp, to counts [E]. Calls visit(id, expert,
// rank) for every request, where rank is counts[expert] before the request.
template <typename Visit>
__device__ void count_run(
    const Requests& requests, int64_t begin, int64_t end, int32_t* counts, Visit&& visit) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t base = begin; base < end; base += kWarp) {
    const int64_t i = base + lane;
    const int32_t id = i < end ? requests.id(i) : -1;
    const int32_t e = id < 0 ? -1 : requests.expert_of(id);
    const unsigned same = __match_any_sync(kAllLanes, e);
    const int32_t before = e < 0 ? 0 : counts[e];
    __syncwarp();  // all lanes have read counts
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) counts[e] = before + __popc(same);
    __syncwarp();
    if (id >= 0) visit(id, e, before + rank);
  }
}

// Counts the runs of all warps of the block: counts [warps, E], in shared memory.
__device__ void count_chunk(const Requests& requests, int64_t begin, int64_t end, int32_t* counts) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t i = threadIdx.x; i < warps * requests.E; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  count_run(
      requests, begin, end, counts + threadIdx.x / kWarp * requests.E,
      [](int32_t, int32_t, int32_t) {});
  __syncthreads();
}

struct Shape : Slots {
  int64_t K, chunks;  // requests per token; chunks per group
};

// The chunk of this block, and the run [begin, end) of this warp.
struct Chunk {
  int64_t group, chunk, begin, end;

  __device__ explicit Chunk(const Shape& shape) {
    group = blockIdx.x / shape.chunks;
    chunk = blockIdx.x % shape.chunks;
    const int64_t run = (chunk * blockDim.x + threadIdx.x) / kWarp;
    const int64_t all = shape.tokens * shape.K;
    begin = run * kRun < all ? run * kRun : all;
    end = begin + kRun < all ? begin + kRun : all;
  }
};

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
  count_chunk(requests_of(expert, order, at.group, shape), at.begin, at.end, counts);
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
  for (int64_t e = threadIdx.x; e < shape.E; e += blockDim.x) {
    const int32_t* of_chunk = counted + at.group * shape.chunks * shape.E + e;
    int32_t sum = 0, all = 0;
    for (int64_t chunk = 0; shape.chunks > 1 && chunk < shape.chunks; ++chunk) {
      const int32_t count = of_chunk[chunk * shape.E];
      if (chunk < at.chunk) sum += count;
      all += count;
    }
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
