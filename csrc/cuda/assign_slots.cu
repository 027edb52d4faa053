// A request's place is the number of requests for its expert that are served before it: a
// multisplit. The requests of a group, in the order in which they are served, are cut into chunks,
// one a block, and a chunk into one run a warp. A warp counts its run by expert in shared memory,
// which belongs to it alone, so that nothing is atomic; what the warps and chunks before it counted
// is where its own places begin, and it goes through its run again.
//
// A group of a few thousand requests is one chunk and one launch. With a priority the order comes
// from topk's sort first. To sort a large group would take longer than all the rest: there the
// places make lists of the experts' requests, and a block an expert selects the first of its own,
// in the order in which they are served.
#include <algorithm>

#include "../assign_slots.h"
#include "../topk.h"
#include "select.h"

namespace vmoe::cuda {
namespace {

constexpr int kMostWarps = 8;
constexpr int64_t kRun = 256;  // requests of a warp

struct Requests {
  const int32_t* expert;  // [T, K]  of one group
  const int32_t* order;   // [T] or null
  int64_t tokens, K, E;

  // The request that is served as number i, and its expert, or -1.
  __device__ int32_t id(int64_t i) const {
    const int64_t k = i / tokens, t = i % tokens;
    return static_cast<int32_t>((order ? order[t] : t) * K + k);
  }
  __device__ int32_t expert_of(int32_t id) const {
    const int32_t e = expert[id];
    return e >= 0 && e < E ? e : -1;
  }
};

// Counts the run [begin, end) of this warp into counts [E], and says of every request how
// many of the run are before it: visit(request, expert, rank), with counts[expert] added.
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
    __syncwarp();  // everyone has read
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) counts[e] = before + __popc(same);
    __syncwarp();
    if (id >= 0) visit(id, e, before + rank);
  }
}

// What the warps of a block counted: [warps, E] in shared memory, behind it [E].
__device__ void count_chunk(const Requests& requests, int64_t begin, int64_t end, int32_t* counts) {
  const int warps = static_cast<int>(blockDim.x) / kWarp;
  for (int64_t i = threadIdx.x; i < warps * requests.E; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  count_run(
      requests, begin, end, counts + threadIdx.x / kWarp * requests.E,
      [](int32_t, int32_t, int32_t) {});
  __syncthreads();
}

struct Shape {
  int64_t tokens, K, E, C, chunks;
};

// A block's chunk, and its warps' runs.
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

// Makes of what the warps counted where their own places begin, and counts all requests of an
// expert.
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

__global__ void __launch_bounds__(kMostWarps* kWarp) place_kernel(
    const int32_t* __restrict__ expert,   // [G, T, K]
    const int32_t* __restrict__ order,    // [G, T] or null
    const int32_t* __restrict__ counted,  // [G, chunks, E], not looked at for one chunk
    int32_t* __restrict__ slot,           // [G, T, K]
    int32_t* __restrict__ source,         // [G, E, C]
    Shape shape) {
  int32_t* counts = dynamic_shared<int32_t>();             // [warps, E]
  int32_t* total = counts + blockDim.x / kWarp * shape.E;  // [E]
  const Chunk at(shape);
  const Requests requests = requests_of(expert, order, at.group, shape);
  count_chunk(requests, at.begin, at.end, counts);
  add_up(shape, at, counted, counts, total);
  int32_t* holder = source + at.group * shape.E * shape.C;
  count_run(
      requests, at.begin, at.end, counts + threadIdx.x / kWarp * shape.E,
      [&](int32_t id, int32_t e, int32_t place) {
        const bool placed = e >= 0 && place < shape.C;
        const auto s = static_cast<int32_t>(e * shape.C + place);
        slot[at.group * shape.tokens * shape.K + id] = placed ? s : -1;
        if (placed) holder[s] = id;
      });
  // Which slots stay empty every chunk knows; each sees to its share of them.
  for (int64_t s = at.chunk * blockDim.x + threadIdx.x; s < shape.E * shape.C;
       s += shape.chunks * blockDim.x) {
    if (s % shape.C >= total[s / shape.C]) holder[s] = -1;
  }
}

// ---- A large group with a priority ----

constexpr int64_t kLargeGroup = 4096;  // tokens, from where on
constexpr int kSelectThreads = 512;
constexpr int kMostPlaces = 4096;    // of an expert, that a block sorts
constexpr int64_t kMostKeys = 8192;  // that it keeps

__global__ void __launch_bounds__(kMostWarps* kWarp) list_kernel(
    const int32_t* __restrict__ expert,   // [G, T, K]
    const int32_t* __restrict__ counted,  // [G, chunks, E], not looked at for one chunk
    int32_t* __restrict__ begins,         // [G, E + 1]
    int32_t* __restrict__ lists,          // [G, T * K]  requests by expert, choice 0 before 1
    int32_t* __restrict__ slot,           // [G, T, K]  -1
    Shape shape) {
  int32_t* counts = dynamic_shared<int32_t>();             // [warps, E]
  int32_t* begin = counts + blockDim.x / kWarp * shape.E;  // [E]
  const Chunk at(shape);
  const Requests requests = requests_of(expert, nullptr, at.group, shape);
  count_chunk(requests, at.begin, at.end, counts);
  add_up(shape, at, counted, counts, begin);
  if (threadIdx.x < kWarp) {  // from how many there are of an expert to where they begin
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
  count_run(
      requests, at.begin, at.end, counts + threadIdx.x / kWarp * shape.E,
      [&](int32_t id, int32_t e, int32_t place) {
        slot[first + id] = -1;
        if (e >= 0) lists[first + begin[e] + place] = id;
      });
}

// The order in which requests of an expert are served: an earlier choice first, then a larger
// priority, then an earlier token, as the lists have them.
template <typename T>
struct Serving {
  const int32_t* requests;  // of an expert
  const T* priority;        // [T]
  int64_t K;

  // Whether this key has room for K choices.
  static bool has_room(int64_t K) { return K == 1 || sizeof(T) == sizeof(float); }
  __device__ uint64_t key(int64_t i) const {
    const int32_t id = requests[i];
    const auto choice = static_cast<uint64_t>(id % K);
    const uint64_t key = order_key(priority[id / K]);
    return K == 1 ? key : (static_cast<uint64_t>(K) - 1 - choice) << 32 | key;
  }
};

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

int64_t shared_bytes(int64_t E, int64_t warps) {
  return (warps + 1) * E * static_cast<int64_t>(sizeof(int32_t));
}

template <typename T>
size_t run(
    const int32_t* expert, const T* priority, bool prioritised, int32_t* slot, int32_t* source,
    int64_t G, int64_t tokens, int64_t K, int64_t E, int64_t C, void* memory, bool measure,
    cudaStream_t stream) {
  // Shared memory for many experts is that for fewer warps.
  int64_t warps = kMostWarps;
  while (warps > 1 && shared_bytes(E, warps) > (64 << 10)) warps /= 2;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(tokens * K, warps * kRun));
  Workspace workspace(memory);
  int32_t* counted = workspace.take<int32_t>(chunks > 1 ? G * chunks * E : 0);
  const Shape shape{tokens, K, E, C, chunks};
  const auto shared = static_cast<size_t>(shared_bytes(E, warps));
  const int threads = static_cast<int>(warps) * kWarp;
  const auto count = [&](const int32_t* order) {
    if (chunks == 1) return;
    launch(count_kernel, G * chunks, threads, shared, stream, expert, order, counted, shape);
  };

  if (prioritised && tokens > kLargeGroup && C <= kMostPlaces && Serving<T>::has_room(K)) {
    int32_t* begins = workspace.take<int32_t>(G * (E + 1));
    int32_t* lists = workspace.take<int32_t>(G * tokens * K);
    if (measure) return workspace.size();
    count(nullptr);
    launch(
        list_kernel, G * chunks, threads, shared, stream, expert, counted, begins, lists, slot,
        shape);
    int places = 1;
    while (places < C) places *= 2;
    const int64_t room = shared_limit() - places * static_cast<int64_t>(sizeof(Pick<uint64_t>));
    const int64_t keys = std::clamp<int64_t>(
        room / static_cast<int64_t>(sizeof(uint64_t)), 0, std::min(kMostKeys, tokens * K));
    launch(
        select_kernel<T>, G * E, kSelectThreads,
        places * sizeof(Pick<uint64_t>) + static_cast<size_t>(keys) * sizeof(uint64_t), stream,
        priority, begins, lists, slot, source, shape, places, keys);
    return workspace.size();
  }

  const int32_t* order = nullptr;
  if (prioritised) {
    T* values = workspace.take<T>(G * tokens);
    int32_t* sorted = workspace.take<int32_t>(G * tokens);
    char* scratch =
        workspace.take<char>(static_cast<int64_t>(topk_workspace<T>(tokens, 1, tokens, G)));
    if (!measure) topk(priority, values, sorted, tokens, 1, tokens, G, scratch, stream);
    order = sorted;
  }
  if (measure || G == 0) return workspace.size();
  count(order);
  launch(
      place_kernel, G * chunks, threads, shared, stream, expert, order, counted, slot, source,
      shape);
  return workspace.size();
}

}  // namespace

int64_t assign_slots_most_experts() { return shared_limit() / shared_bytes(1, 1); }

template <typename T>
size_t assign_slots_workspace(
    bool prioritised, int64_t G, int64_t tokens, int64_t K, int64_t E, int64_t C) {
  return run<T>(
      nullptr, nullptr, prioritised, nullptr, nullptr, G, tokens, K, E, C, nullptr, true, nullptr);
}

template <typename T>
void assign_slots(
    const int32_t* expert, const T* priority, int32_t* slot, int32_t* source, int64_t G,
    int64_t tokens, int64_t K, int64_t E, int64_t C, void* workspace, CUstream_st* stream) {
  run(expert, priority, priority != nullptr, slot, source, G, tokens, K, E, C, workspace, false,
      stream);
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template size_t assign_slots_workspace<T>(bool, int64_t, int64_t, int64_t, int64_t, int64_t);    \
  template void assign_slots(                                                                      \
      const int32_t*, const T*, int32_t*, int32_t*, int64_t, int64_t, int64_t, int64_t, int64_t,   \
      void*, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
