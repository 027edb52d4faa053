// The backward is one pass over the logits, with a few lanes per token and without atomics. The
// picks of a token are its row of indices or, if experts chose tokens, its list from invert_slots,
// in ascending order. If an expert is picked twice for a token, the lane of the first pick writes
// the gradient of both picks.
#include <algorithm>

#include "../invert_slots.h"
#include "../softmax_gather.h"
#include "softmax.h"

namespace vmoe::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads) gather_kernel(
    const T* __restrict__ logits,         // [G, T, E]
    const int32_t* __restrict__ indices,  // [G, T, K], or by expert [G, E, K]
    const T* __restrict__ high,           // [G, T]
    const T* __restrict__ scale,          // [G, T]
    T* __restrict__ values,               // shape of indices
    int64_t tokens, int64_t E, int64_t K, bool by_expert, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * kSoftmaxThreads + threadIdx.x;
  if (i >= size) return;
  const int32_t index = indices[i];
  T value = 0;
  if (index >= 0 && index < (by_expert ? tokens : E)) {
    const int64_t row = i / K;
    const int64_t t = by_expert ? row / E * tokens + index : row;
    const int64_t e = by_expert ? row % E : index;
    value = exp_negative(logits[t * E + e] - high[t]) * scale[t];
  }
  values[i] = value;
}

struct TokenPicks {
  const int32_t* list;  // the expert of each pick, or with by_expert its slot e * K + position
  int64_t first, count, E, K;
  bool by_expert;

  // Position of pick j in grad and values.
  __device__ int64_t place(int64_t j) const { return first + (by_expert ? list[j] : j); }
  __device__ int64_t expert(int64_t j) const { return by_expert ? list[j] / K : list[j]; }
  // Whether pick j is a valid expert.
  __device__ bool picks(int64_t j) const { return expert(j) >= 0 && expert(j) < E; }
};

template <typename T, int kLanes>
__global__ void __launch_bounds__(kSoftmaxThreads) backward_kernel(
    const T* __restrict__ grad,           // shape of indices
    const T* __restrict__ values,         // shape of indices
    const int32_t* __restrict__ indices,  // [G, T, K], or by expert [G, E, K]
    const int32_t* __restrict__ offsets,  // [G, T + 1]  of invert_slots, if by expert; else null
    const int32_t* __restrict__ slots,    // [G, E * K]  of invert_slots, if by expert; else null
    const T* __restrict__ logits,         // [G, T, E]
    const T* __restrict__ high,           // [G, T]
    const T* __restrict__ scale,          // [G, T]
    T* grad_logits,                       // [G, T, E]
    int64_t tokens, int64_t E, int64_t K, int64_t rows, bool wide) {
  const int64_t own = (int64_t{blockIdx.x} * kSoftmaxThreads + threadIdx.x) / kLanes;
  const bool has_row = own < rows;
  const int64_t row = has_row ? own : rows - 1;  // all lanes of a warp take part in its shuffles
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  TokenPicks picks{indices + row * K, row * K, K, E, K, false};
  if (offsets) {
    const int64_t g = row / tokens;
    const int32_t* of_token = offsets + row + g;
    picks = {slots + g * E * K + of_token[0], g * E * K, of_token[1] - of_token[0], E, K, true};
  }
  T dot = 0;
  for (int64_t j = lane; j < picks.count; j += kLanes) {
    if (picks.picks(j)) dot += grad[picks.place(j)] * values[picks.place(j)];
  }
  dot = sum_of_lanes<kLanes>(dot);
  const T shift = high[row], by = -dot * scale[row];
  const T* from = logits + row * E;
  T* to = grad_logits + row * E;
  const auto unpicked = [&](T logit) { return exp_negative(logit - shift) * by; };
  if (has_row && wide) {
    constexpr int kTogether = kWideEntries<T>;
    for (int64_t e = lane * kTogether; e < E; e += kLanes * kTogether) {
      auto piece = *reinterpret_cast<const Wide<T>*>(from + e);
#pragma unroll
      for (int i = 0; i < kTogether; ++i) piece.entry[i] = unpicked(piece.entry[i]);
      *reinterpret_cast<Wide<T>*>(to + e) = piece;
    }
  } else if (has_row) {
    for (int64_t e = lane; e < E; e += kLanes) to[e] = unpicked(from[e]);
  }
  __syncwarp();  // the loop below overwrites entries that other lanes have written
  if (!has_row) return;
  for (int64_t j = lane; j < picks.count; j += kLanes) {
    if (!picks.picks(j)) continue;
    const int64_t e = picks.expert(j);
    int64_t before = 0;
    while (picks.expert(before) != e) ++before;
    if (before < j) continue;
    T total = unpicked(from[e]);
    for (int64_t i = j; i < picks.count; ++i) {
      if (picks.expert(i) == e) total += grad[picks.place(i)] * values[picks.place(i)];
    }
    to[e] = total;
  }
}

}  // namespace

template <typename T>
void softmax_gather(
    const T* logits, const int32_t* indices, T* values, T* high, T* scale, int64_t G,
    int64_t tokens, int64_t E, int64_t K, bool by_expert, CUstream_st* stream) {
  softmax_norms(logits, high, scale, E, G * tokens, stream);
  const int64_t size = G * (by_expert ? E : tokens) * K;
  launch(
      gather_kernel<T>, ceil_div(size, kSoftmaxThreads), kSoftmaxThreads, 0, stream, logits,
      indices, high, scale, values, tokens, E, K, by_expert, size);
}

namespace {

// The lists of invert_slots, in the workspace.
struct Lists {
  int32_t* offsets;  // [G, T + 1]
  int32_t* slots;    // [G, E * K]
  char* rest;        // the workspace of invert_slots
};

Lists lists(Workspace& workspace, int64_t G, int64_t tokens, int64_t E, int64_t K) {
  int32_t* offsets = workspace.take<int32_t>(G * (tokens + 1));
  int32_t* slots = workspace.take<int32_t>(G * E * K);
  const size_t rest = invert_slots_workspace({G, tokens, E, K});
  return {offsets, slots, workspace.take<char>(static_cast<int64_t>(rest))};
}

}  // namespace

size_t softmax_gather_backward_workspace(
    int64_t G, int64_t tokens, int64_t E, int64_t K, bool by_expert) {
  Workspace workspace(nullptr);
  if (by_expert) lists(workspace, G, tokens, E, K);
  return workspace.size();
}

template <typename T>
void softmax_gather_backward(
    const T* grad, const T* values, const T* logits, const int32_t* indices, const T* high,
    const T* scale, T* grad_logits, int64_t G, int64_t tokens, int64_t E, int64_t K, bool by_expert,
    void* memory, CUstream_st* stream) {
  Workspace workspace(memory);
  Lists inverse{};
  if (by_expert) {
    inverse = lists(workspace, G, tokens, E, K);
    invert_slots(
        indices, inverse.offsets, inverse.slots, nullptr, {G, tokens, E, K}, inverse.rest, stream);
  }
  by_row_length(std::min(E, kLongestRow), [&](auto shape) {
    using Shape = decltype(shape);
    constexpr int kLanes = Shape::kLanes * kSumsOfLane<Shape::kLanes, Shape::kEach>;
    launch(
        backward_kernel<T, kLanes>, ceil_div(G * tokens * kLanes, kSoftmaxThreads), kSoftmaxThreads,
        0, stream, grad, values, indices, inverse.offsets, inverse.slots, logits, high, scale,
        grad_logits, tokens, E, K, G * tokens,
        rows_are_wide(logits, E) && rows_are_wide(grad_logits, E));
  });
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void softmax_gather(                                                                    \
      const T*, const int32_t*, T*, T*, T*, int64_t, int64_t, int64_t, int64_t, bool,              \
      CUstream_st*);                                                                               \
  template void softmax_gather_backward(                                                           \
      const T*, const T*, const T*, const int32_t*, const T*, const T*, T*, int64_t, int64_t,      \
      int64_t, int64_t, bool, void*, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
