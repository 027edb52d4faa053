// The rank of a request (requests.h) is its position in the buffer of its expert. A group of up to
// 2048 requests is one chunk, and takes one launch. (The limit is lower if there are very many
// experts.) With priorities, topk sorts the tokens of every group first. In large groups each
// expert selects its requests instead (assign_by_expert.h).
#include <algorithm>

#include "../assign_slots.h"
#include "../topk.h"
#include "assign_by_expert.h"

namespace vmoe::cuda {
namespace {

// Writes the slot of every request. The rank of a request is its position in the buffer if the rank
// is below C. Otherwise the request is dropped.
__global__ void __launch_bounds__(kMostWarps* kWarp, 4) place_kernel(
    const int32_t* __restrict__ expert,   // [G, T, K]
    const int32_t* __restrict__ order,    // [G, T] or null
    const int32_t* __restrict__ counted,  // [G, chunks, E], not read if there is one chunk
    int32_t* __restrict__ slot,           // [G, T, K]
    int32_t* __restrict__ source,         // [G, E, C]
    Shape shape) {
  int32_t* counts = dynamic_shared<int32_t>();             // [warps, E]
  int32_t* total = counts + blockDim.x / kWarp * shape.E;  // [E]
  const Chunk at(shape);
  const Run run(requests_of(expert, order, at.group, shape), at);
  count_chunk(run, shape.E, counts);
  add_up(shape, at, counted, counts, total);
  int32_t* holder = source + at.group * shape.E * shape.C;
  run.count(counts + threadIdx.x / kWarp * shape.E, [&](int32_t id, int32_t e, int32_t place) {
    const bool placed = e >= 0 && place < shape.C;
    const auto s = static_cast<int32_t>(e * shape.C + place);
    slot[at.group * shape.tokens * shape.K + id] = placed ? s : -1;
    if (placed) holder[s] = id;
  });
  // Marks the empty slots. Every block has the total of every expert, and marks a part of the
  // slots.
  for (int64_t s = at.chunk * blockDim.x + threadIdx.x; s < shape.E * shape.C;
       s += shape.chunks * blockDim.x) {
    if (s % shape.C >= total[s / shape.C]) holder[s] = -1;
  }
}

// The launch parameters of a call, and its arrays in the workspace.
template <typename T>
struct Layout {
  Shape shape;
  int threads;
  size_t shared;
  bool by_expert;
  Workspace workspace;
  int32_t* counted;  // [G, chunks, E], if there are several chunks
  // With by_expert:
  int32_t *begins = nullptr, *lists = nullptr;  // [G, E + 1], [G, T * K]
  // With priorities and without by_expert, results and workspace of topk:
  T* sorted = nullptr;       // [G, T]
  int32_t* order = nullptr;  // [G, T]
  char* sorting = nullptr;

  Layout(void* memory, bool prioritised, const Slots& slots, int64_t K) : workspace(memory) {
    // With many experts, a block has fewer warps, so that its counters fit in shared memory.
    int64_t warps = kMostWarps;
    while (warps > 1 && shared_bytes(slots.E, warps) > (64 << 10)) warps /= 2;
    const int64_t chunks = std::max<int64_t>(1, ceil_div(slots.tokens * K, warps * kRun));
    shape = {slots, K, chunks};
    threads = static_cast<int>(warps) * kWarp;
    shared = static_cast<size_t>(shared_bytes(slots.E, warps));
    by_expert = prioritised && is_by_expert<T>(shape);
    counted = workspace.take<int32_t>(chunks > 1 ? slots.G * chunks * slots.E : 0);
    if (by_expert) {
      begins = workspace.take<int32_t>(slots.G * (slots.E + 1));
      lists = workspace.take<int32_t>(slots.all_tokens() * K);
    } else if (prioritised) {
      const size_t bytes = topk_workspace<T>(slots.tokens, 1, slots.tokens, slots.G);
      sorted = workspace.take<T>(slots.all_tokens());
      order = workspace.take<int32_t>(slots.all_tokens());
      sorting = workspace.take<char>(static_cast<int64_t>(bytes));
    }
  }

  template <typename Kernel, typename... Args>
  void launch_chunks(Kernel kernel, cudaStream_t stream, Args... args) const {
    launch(kernel, shape.G * shape.chunks, threads, shared, stream, args..., shape);
  }
};

}  // namespace

int64_t assign_slots_most_experts() { return shared_limit() / shared_bytes(1, 1); }

template <typename T>
size_t assign_slots_workspace(bool prioritised, const Slots& shape, int64_t K) {
  return Layout<T>(nullptr, prioritised, shape, K).workspace.size();
}

template <typename T>
void assign_slots(
    const int32_t* expert, const T* priority, int32_t* slot, int32_t* source, const Slots& slots,
    int64_t K, void* workspace, CUstream_st* stream) {
  if (slots.G == 0) return;
  const Layout<T> at(workspace, priority != nullptr, slots, K);
  if (at.order) {
    topk(priority, at.sorted, at.order, slots.tokens, 1, slots.tokens, slots.G, at.sorting, stream);
  }
  if (at.shape.chunks > 1) {
    at.launch_chunks(count_kernel, stream, expert, at.order, at.counted);
  }
  if (at.by_expert) {
    at.launch_chunks(list_kernel, stream, expert, at.counted, at.begins, at.lists, slot);
    launch_select(priority, at.begins, at.lists, slot, source, at.shape, stream);
  } else {
    at.launch_chunks(place_kernel, stream, expert, at.order, at.counted, slot, source);
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template size_t assign_slots_workspace<T>(bool, const Slots&, int64_t);                          \
  template void assign_slots(                                                                      \
      const int32_t*, const T*, int32_t*, int32_t*, const Slots&, int64_t, void*, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
