// assign_by_expert -- assigns the slots of a large group with priorities, without sorting its
// tokens.
//
// list_kernel writes one list of requests per expert, ordered by the ranks of requests.h. In
// select_kernel one block per expert selects the C requests of the list that are served first.
#pragma once

#include <algorithm>

#include "requests.h"
#include "select.h"

namespace vmoe::cuda {
namespace {

constexpr int64_t kLargeGroup = 4096;  // groups with more tokens are assigned by expert
constexpr int kSelectThreads = 512;
constexpr int kMostPlaces = 4096;    // most slots per expert: a block sorts their requests
constexpr int64_t kMostKeys = 8192;  // most keys that a block keeps in shared memory

// Writes the list of every expert's requests, and -1 to all slots.
__global__ void __launch_bounds__(kMostWarps* kWarp, 4) list_kernel(
    const int32_t* __restrict__ expert,   // [G, T, K]
    const int32_t* __restrict__ counted,  // [G, chunks, E], not read if there is one chunk
    int32_t* __restrict__ begins,         // [G, E + 1]  where the list of each expert begins
    int32_t* __restrict__ lists,          // [G, T * K]  requests by expert, choice 0 before 1
    int32_t* __restrict__ slot,           // [G, T, K]  set to -1
    Shape shape) {
  int32_t* counts = dynamic_shared<int32_t>();             // [warps, E]
  int32_t* begin = counts + blockDim.x / kWarp * shape.E;  // [E]
  const Chunk at(shape);
  const Run run(requests_of(expert, nullptr, at.group, shape), at);
  count_chunk(run, shape.E, counts);
  add_up(shape, at, counted, counts, begin);
  if (threadIdx.x < kWarp) {  // one warp replaces the numbers of requests by their prefix sums
    const int lane = static_cast<int>(threadIdx.x);
    int32_t before = 0;
    for (int64_t base = 0; base < shape.E; base += kWarp) {
      const int64_t e = base + lane;
      const int32_t count = e < shape.E ? begin[e] : 0;
      int32_t sum = count;
      for (int turn = 1; turn < kWarp; turn *= 2) {
        const int32_t other = __shfl_up_sync(kAllLanes, sum, turn);
        if (lane >= turn) sum += other;
      }
      if (e < shape.E) begin[e] = before + sum - count;
      before += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    int32_t* of_group = begins + at.group * (shape.E + 1);
    for (int64_t e = lane; at.chunk == 0 && e <= shape.E; e += kWarp) {
      of_group[e] = e < shape.E ? begin[e] : before;
    }
  }
  __syncthreads();
  const int64_t first = at.group * shape.tokens * shape.K;
  run.count(counts + threadIdx.x / kWarp * shape.E, [&](int32_t id, int32_t e, int32_t place) {
    slot[first + id] = -1;
    if (e >= 0) lists[first + begin[e] + place] = id;
  });
}

// The order in which the requests of an expert are served: first by choice, then by descending
// priority, then by token. Keys order the requests by choice and then by priority. Requests with
// equal keys keep the order of the list, which is by token.
template <typename T>
struct Serving {
  const int32_t* requests;  // the list of an expert
  const T* priority;        // [T]
  int64_t K;

  // Whether a key of 64 bits has room for a choice and a priority.
  static bool has_room(int64_t K) { return K == 1 || sizeof(T) == sizeof(float); }
  __device__ uint64_t key(int64_t i) const {
    const int32_t id = requests[i];
    const auto choice = static_cast<uint64_t>(id % K);
    const uint64_t key = order_key(priority[id / K]);
    return K == 1 ? key : (static_cast<uint64_t>(K) - 1 - choice) << 32 | key;
  }
};

// One block per expert selects its first C requests, and writes their slots.
template <typename T>
__global__ void __launch_bounds__(kSelectThreads) select_kernel(
    const T* __restrict__ priority,      // [G, T]
    const int32_t* __restrict__ begins,  // [G, E + 1]
    const int32_t* __restrict__ lists,   // [G, T * K]
    int32_t* __restrict__ slot,          // [G, T, K]
    int32_t* __restrict__ source,        // [G, E, C]
    Shape shape, int most_places, int64_t most_keys) {
  using Select = BlockSelect<uint64_t, kSelectThreads>;
  __shared__ typename Select::Storage storage;
  static_assert(sizeof(storage) <= kDeclaredShared);
  auto* picks = dynamic_shared<Pick<uint64_t>>();                 // [most_places]
  auto* keys = reinterpret_cast<uint64_t*>(picks + most_places);  // [most_keys]
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t g = blockIdx.x / shape.E, e = blockIdx.x % shape.E;
  const int32_t* begin = begins + g * (shape.E + 1) + e;
  const int64_t first = g * shape.tokens * shape.K, n = begin[1] - begin[0];
  const int64_t k = n < shape.C ? n : shape.C;
  const Serving<T> serving{lists + first + begin[0], priority + g * shape.tokens, shape.K};
  if (k > 0) {
    int places = 1;
    while (places < n && places < most_places) places *= 2;
    Select::select(
        storage, picks, places, keys, n <= most_keys, n, k,
        [&](int64_t i) { return serving.key(i); }, [&](int64_t i) { return serving.requests[i]; });
  }
  int32_t* holder = source + (g * shape.E + e) * shape.C;
  for (int64_t j = tid; j < shape.C; j += kSelectThreads) {
    holder[j] = j < k ? picks[j].index : -1;
    if (j < k) slot[first + picks[j].index] = static_cast<int32_t>(e * shape.C + j);
  }
}

template <typename T>
bool is_by_expert(const Shape& shape) {
  return shape.tokens > kLargeGroup && shape.C <= kMostPlaces && Serving<T>::has_room(shape.K);
}

// Launches select_kernel, which reads the results of list_kernel.
template <typename T>
void launch_select(
    const T* priority, const int32_t* begins, const int32_t* lists, int32_t* slot, int32_t* source,
    const Shape& shape, cudaStream_t stream) {
  int places = 1;
  while (places < shape.C) places *= 2;
  const int64_t sorted = places * static_cast<int64_t>(sizeof(Pick<uint64_t>));
  const int64_t keys = std::clamp<int64_t>(
      (shared_limit() - sorted) / static_cast<int64_t>(sizeof(uint64_t)), 0,
      std::min(kMostKeys, shape.tokens * shape.K));
  launch(
      select_kernel<T>, shape.G * shape.E, kSelectThreads,
      static_cast<size_t>(sorted) + static_cast<size_t>(keys) * sizeof(uint64_t), stream, priority,
      begins, lists, slot, source, shape, places, keys);
}

}  // namespace
}  // namespace vmoe::cuda
