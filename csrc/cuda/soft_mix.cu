// Over the slots a softmax is a row's, as it lies: softmax.h has it. Over the tokens a block has 32
// slots of a group, a warp reads them of one token, and each thread follows one slot: the three
// passes over the tile find it in the first-level cache.
#include "../slot_row.h"
#include "../soft_mix.h"
#include "rows.h"
#include "softmax.h"

namespace vmoe::cuda {
namespace {

template <typename T, int kLanes, int kEach>
__global__ void __launch_bounds__(kSoftmaxThreads) slots_kernel(
    const T* __restrict__ logits,  // [rows, S]
    T* __restrict__ weights,       // [rows, S]
    int64_t S, int64_t rows, bool wide) {
  using Softmax = RowSoftmax<T, kLanes, kEach>;
  constexpr int kTogether = Softmax::kTogether;
  const int64_t row = (int64_t{blockIdx.x} * kSoftmaxThreads + threadIdx.x) / kLanes;
  Softmax softmax;
  softmax.read(logits + (row < rows ? row : rows - 1) * S, S, wide);  // the warp stays together
  if (row >= rows) return;
  T* to = weights + row * S;
#pragma unroll
  for (int i = 0; i < kEach; i += kTogether) {
    const int32_t s = Softmax::Picks::index(i);
    Wide<T> piece;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) piece.entry[j] = softmax.gate(i + j);
    if (wide) {
      if (s < S) *reinterpret_cast<Wide<T>*>(to + s) = piece;
    } else {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        if (s + j < S) to[s + j] = piece.entry[j];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads) long_slots_kernel(
    const T* __restrict__ logits,  // [rows, S]
    T* __restrict__ weights,       // [rows, S]
    int64_t S) {
  const T* from = logits + blockIdx.x * S;
  T* to = weights + blockIdx.x * S;
  const Norms<T> norms = norms_of_block(from, S);
  for (int64_t s = threadIdx.x; s < S; s += kSoftmaxThreads) {
    to[s] = exp_negative(from[s] - norms.high) * norms.scale;
  }
}

// A warp a row, of any length.
template <typename T>
__global__ void __launch_bounds__(kRowThreads) slots_backward_kernel(
    const T* __restrict__ weights,  // [rows, S]
    T* __restrict__ grad,           // [rows, S]
    int64_t S, int64_t rows) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const T* w = weights + row * S;
  T* d = grad + row * S;
  T mean = 0;
#pragma unroll 4
  for (int64_t s = lane_of_warp(); s < S; s += kWarp) mean = Fused{}(w[s], d[s], mean);
  mean = sum_of_lanes<kWarp>(mean);
#pragma unroll 4
  for (int64_t s = lane_of_warp(); s < S; s += kWarp) d[s] = w[s] * (d[s] - mean);
}

// The block's 32 slots of a group, and how its threads go over them: `down` threads a slot.
template <typename T>
struct SlotTile {
  static constexpr int kDown = kSoftmaxThreads / kWarp;

  int64_t tokens, S;
  int64_t first;  // where the slot's logit of token 0 is
  int down;
  bool there;

  __device__ SlotTile(int64_t tokens_, int64_t S_) : tokens(tokens_), S(S_) {
    const int64_t tiles = ceil_div(S, kWarp), g = blockIdx.x / tiles;
    const int64_t slot = blockIdx.x % tiles * kWarp + threadIdx.x % kWarp;
    first = g * tokens * S + slot;
    down = static_cast<int>(threadIdx.x) / kWarp;
    there = slot < S;
  }

  // body(place) of this thread's tokens.
  template <typename Body>
  __device__ void each(Body&& body) const {
    if (!there) return;
#pragma unroll 4
    for (int64_t t = down; t < tokens; t += kDown) body(first + t * S);
  }

  // join(all, one) over the threads of a slot, in one order. `shared` has room for one a thread, and
  // is of this call alone.
  template <typename Join>
  __device__ T together(T (&shared)[kDown][kWarp], T value, Join&& join) const {
    const int column = static_cast<int>(threadIdx.x) % kWarp;
    shared[down][column] = value;
    __syncthreads();
    T all = shared[0][column];
    for (int i = 1; i < kDown; ++i) all = join(all, shared[i][column]);
    return all;
  }
};

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads) tokens_kernel(
    const T* __restrict__ logits,  // [G, T, S]
    T* __restrict__ weights,       // [G, T, S]
    int64_t tokens, int64_t S) {
  using Tile = SlotTile<T>;
  __shared__ T highs[Tile::kDown][kWarp], totals[Tile::kDown][kWarp];
  const Tile tile(tokens, S);
  T high = kAbsent<T>, total = 0;
  tile.each([&](int64_t i) { high = larger(logits[i], high); });
  high = softmax_shift(tile.together(highs, high, [](T all, T one) { return larger(one, all); }));
  tile.each([&](int64_t i) { total += exp_negative(logits[i] - high); });
  total = tile.together(totals, total, [](T all, T one) { return all + one; });
  const T scale = softmax_scale(total);
  tile.each([&](int64_t i) { weights[i] = exp_negative(logits[i] - high) * scale; });
}

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads) tokens_backward_kernel(
    const T* __restrict__ weights,  // [G, T, S]
    T* __restrict__ grad,           // [G, T, S]
    int64_t tokens, int64_t S) {
  using Tile = SlotTile<T>;
  __shared__ T means[Tile::kDown][kWarp];
  const Tile tile(tokens, S);
  T mean = 0;
  tile.each([&](int64_t i) { mean = Fused{}(weights[i], grad[i], mean); });
  mean = tile.together(means, mean, [](T all, T one) { return all + one; });
  tile.each([&](int64_t i) { grad[i] = weights[i] * (grad[i] - mean); });
}

// Unit: what a lane copies at once, by what the rows' size and place allow.
template <typename Unit, bool kToSlots>
__global__ void __launch_bounds__(kRowThreads) move_kernel(
    const Unit* __restrict__ from, Unit* __restrict__ to, int64_t G, int64_t E, int64_t C,
    int64_t units) {
  const int64_t row = row_of_warp(), S = E * C;  // of [G, S]
  if (row >= G * S) return;
  const int64_t slot = row_of_slot(row / S, row % S, G, C);
  const int64_t begin = (kToSlots ? row : slot) * units, end = (kToSlots ? slot : row) * units;
#pragma unroll 4
  for (int64_t i = lane_of_warp(); i < units; i += kWarp) to[end + i] = from[begin + i];
}

template <bool kToSlots, typename T>
void move(const T* from, T* to, int64_t G, int64_t E, int64_t C, int64_t D, cudaStream_t stream) {
  const auto with = [&](auto unit, int64_t units) {
    using Unit = decltype(unit);
    launch(
        move_kernel<Unit, kToSlots>, blocks_of_rows(G * E * C), kRowThreads, 0, stream,
        reinterpret_cast<const Unit*>(from), reinterpret_cast<Unit*>(to), G, E, C, units);
  };
  if (in_wide_pieces<T>(D, from, to)) {
    with(uint4{}, D / kWideEntries<T>);
  } else {
    with(T{}, D);
  }
}

}  // namespace

template <typename T>
void soft_mix(
    const T* logits, T* weights, int64_t G, int64_t tokens, int64_t S, bool over_tokens,
    CUstream_st* stream) {
  const int64_t rows = G * tokens;
  if (over_tokens) {
    launch(
        tokens_kernel<T>, G * ceil_div(S, kWarp), kSoftmaxThreads, 0, stream, logits, weights,
        tokens, S);
  } else if (S > kLongestRow) {
    launch(long_slots_kernel<T>, rows, kSoftmaxThreads, 0, stream, logits, weights, S);
  } else {
    by_row_length(S, [&](auto shape) {
      using Shape = decltype(shape);
      launch(
          slots_kernel<T, Shape::kLanes, Shape::kEach>,
          ceil_div(rows * Shape::kLanes, kSoftmaxThreads), kSoftmaxThreads, 0, stream, logits,
          weights, S, rows, rows_are_wide(logits, S) && rows_are_wide(weights, S));
    });
  }
}

template <typename T>
void soft_mix_backward(
    const T* weights, T* grad, int64_t G, int64_t tokens, int64_t S, bool over_tokens,
    CUstream_st* stream) {
  if (over_tokens) {
    launch(
        tokens_backward_kernel<T>, G * ceil_div(S, kWarp), kSoftmaxThreads, 0, stream, weights,
        grad, tokens, S);
  } else {
    launch(
        slots_backward_kernel<T>, blocks_of_rows(G * tokens), kRowThreads, 0, stream, weights, grad,
        S, G * tokens);
  }
}

template <typename T>
void soft_mix_rows(
    const T* slots, T* rows, int64_t G, int64_t E, int64_t C, int64_t D, CUstream_st* stream) {
  move<false>(slots, rows, G, E, C, D, stream);
}

template <typename T>
void soft_mix_slots(
    const T* rows, T* slots, int64_t G, int64_t E, int64_t C, int64_t D, CUstream_st* stream) {
  move<true>(rows, slots, G, E, C, D, stream);
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void soft_mix(const T*, T*, int64_t, int64_t, int64_t, bool, CUstream_st*);             \
  template void soft_mix_backward(const T*, T*, int64_t, int64_t, int64_t, bool, CUstream_st*);    \
  template void soft_mix_rows(const T*, T*, int64_t, int64_t, int64_t, int64_t, CUstream_st*);     \
  template void soft_mix_slots(const T*, T*, int64_t, int64_t, int64_t, int64_t, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
