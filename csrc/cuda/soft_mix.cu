// The softmax over the slots is a softmax of contiguous rows (softmax.h).
//
// In the softmax over the tokens, a block computes 32 adjacent slots of a group. A thread computes
// every kDown-th token of one slot. If the rows are aligned to 16 bytes, a thread computes as many
// adjacent slots as 16 bytes hold, and keeps the logits in registers if it has few tokens. In all
// other cases a thread reads the logits from memory again in each pass.
//
// The same kernels compute forward and backward. The backward computes the weights again, and then
// the gradient.
#include "../common/row_stride.h"
#include "../common/slots.h"
#include "../soft_mix.h"
#include "softmax.h"

namespace vmoe::cuda {
namespace {

template <typename Row, int kLanes, int kEach, bool kBackward>
__global__ void __launch_bounds__(kSoftmaxThreads) slots_kernel(
    const Compute<Row>* __restrict__ logits,  // [rows, S]
    Row* __restrict__ weights,                // [rows, row_stride]
    Compute<Row>* __restrict__ grad,          // [rows, S]
    int64_t S, int64_t rows, bool wide) {
  using T = Compute<Row>;
  using Softmax = RowSoftmax<T, kLanes, kEach>;
  constexpr int kTogether = Softmax::kTogether;
  const int64_t row = (int64_t{blockIdx.x} * kSoftmaxThreads + threadIdx.x) / kLanes;
  const bool has_row = row < rows;
  Softmax softmax;
  // Lanes without a row read the last row: all lanes of a warp must take part in its shuffles.
  softmax.read(logits + (has_row ? row : rows - 1) * S, static_cast<int>(S), wide);
  if constexpr (kBackward) {
    T* of = grad + row * S;
    Wide<T> pieces[kEach / kTogether];
    T mean = 0;
#pragma unroll
    for (int i = 0; i < kEach; i += kTogether) {
      Wide<T>& piece = pieces[i / kTogether];
      piece = load_entries(of, Softmax::Picks::index(i), has_row ? S : 0, wide, T{0});
#pragma unroll
      for (int j = 0; j < kTogether; ++j) mean = Fused{}(softmax.gate(i + j), piece.entry[j], mean);
    }
    mean = sum_of_lanes<kLanes>(mean);
    if (!has_row) return;
#pragma unroll
    for (int i = 0; i < kEach; i += kTogether) {
      Wide<T>& piece = pieces[i / kTogether];
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        piece.entry[j] = softmax.gate(i + j) * (piece.entry[j] - mean);
      }
      store_entries(of, Softmax::Picks::index(i), S, wide, piece);
    }
  }
  if (!has_row) return;
#pragma unroll
  for (int i = 0; i < kEach; i += kTogether) {
    Wide<T> piece;
#pragma unroll
    for (int j = 0; j < kTogether; ++j) piece.entry[j] = softmax.gate(i + j);
    store_entries(weights + row * row_stride<Row>(S), Softmax::Picks::index(i), S, true, piece);
  }
}

// For rows of more than kLongestRow slots: one block per row.
template <typename Row, bool kBackward>
__global__ void __launch_bounds__(kSoftmaxThreads) long_slots_kernel(
    const Compute<Row>* __restrict__ logits,  // [rows, S]
    Row* __restrict__ weights,                // [rows, row_stride]
    Compute<Row>* __restrict__ grad,          // [rows, S]
    int64_t S) {
  using T = Compute<Row>;
  const T* from = logits + blockIdx.x * S;
  Row* to = weights + blockIdx.x * row_stride<Row>(S);
  const Norms<T> norms = norms_of_block(from, S);
  const auto weight = [&](int64_t s) { return exp_negative(from[s] - norms.high) * norms.scale; };
  if constexpr (kBackward) {
    T* of = grad + blockIdx.x * S;
    T mean = 0;
    for (int64_t s = threadIdx.x; s < S; s += kSoftmaxThreads)
      mean = Fused{}(weight(s), of[s], mean);
    mean = sum_of_block(mean);
    for (int64_t s = threadIdx.x; s < S; s += kSoftmaxThreads) of[s] = weight(s) * (of[s] - mean);
  }
  for (int64_t s = threadIdx.x; s < S; s += kSoftmaxThreads) to[s] = narrow<Row>(weight(s));
}

// The 32 slots of a group that a block computes: kEntries adjacent slots per thread, kDown threads
// per slot.
template <typename T, int kEntries>
struct SlotTile {
  static constexpr int kAcross = kWarp / kEntries, kDown = kSoftmaxThreads / kAcross;
  using Entries = Piece<T, kEntries>;

  int64_t group, slot;
  int column, down;

  __device__ explicit SlotTile(int64_t S)
      : group(blockIdx.x / ceil_div(S, kWarp)),
        column(static_cast<int>(threadIdx.x) % kAcross),
        down(static_cast<int>(threadIdx.x) / kAcross) {
    slot = blockIdx.x % ceil_div(S, kWarp) * kWarp + column * kEntries;
  }

  // Reduces the values of the kDown threads of each slot by join(all, one), in a fixed order. All
  // of these threads get the result. No other call may use the same `shared`.
  template <typename Join>
  __device__ void reduce(
      T (&shared)[kSoftmaxThreads / kWarp][kWarp], Entries& value, Join&& join) const {
    const int warp = static_cast<int>(threadIdx.x) / kWarp, first = column * kEntries;
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      T& all = value.entry[j];
      for (int turn = kAcross; turn < kWarp; turn *= 2) {
        all = join(all, __shfl_xor_sync(kAllLanes, all, turn));
      }
      if (down % (kWarp / kAcross) == 0) shared[warp][first + j] = all;
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kEntries; ++j) {
      T all = shared[0][first + j];
      for (int i = 1; i < kSoftmaxThreads / kWarp; ++i) all = join(all, shared[i][first + j]);
      value.entry[j] = all;
    }
  }
};

// kHeld > 0: a thread has at most kHeld tokens, and keeps their logits in registers. kHeld = 0: a
// thread may have any number of tokens, and keeps no logits.
template <typename Row, int kEntries, int kHeld, bool kBackward>
__global__ void __launch_bounds__(kSoftmaxThreads) tokens_kernel(
    const Compute<Row>* __restrict__ logits,  // [G, T, S]
    Row* __restrict__ weights,                // [G, T, row_stride]
    Compute<Row>* __restrict__ grad,          // [G, T, S]
    int64_t tokens, int64_t S) {
  using T = Compute<Row>;
  using Tile = SlotTile<T, kEntries>;
  using Entries = typename Tile::Entries;
  using Shared = T[kSoftmaxThreads / kWarp][kWarp];
  __shared__ Shared highs, totals, means;
  const Tile tile(S);
  const bool has_slot = tile.slot < S;
  const int64_t first = tile.group * tokens * S + tile.slot;

  // Calls body(t, i) for the tokens t of this thread. If kHeld > 0, held[i] has the logits of token
  // t.
  const auto each = [&](auto&& body) {
    if (!has_slot) return;
    if constexpr (kHeld > 0) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t t = tile.down + i * Tile::kDown;
        if (t < tokens) body(t, i);
      }
    } else {
#pragma unroll 4
      for (int64_t t = tile.down; t < tokens; t += Tile::kDown) body(t, 0);
    }
  };
  const auto load = [&](const T* from, int64_t t) {
    return load_piece<kEntries>(from + first + t * S, 0);
  };
  const auto for_entries = [](auto&& body) {
#pragma unroll
    for (int j = 0; j < kEntries; ++j) body(j);
  };

  Entries held[kHeld > 0 ? kHeld : 1];
  Entries high, total = {}, mean = {};
  for_entries([&](int j) { high.entry[j] = kAbsent<T>; });
  each([&](int64_t t, int i) {
    const Entries piece = load(logits, t);
    if constexpr (kHeld > 0) held[i] = piece;
    for_entries([&](int j) { high.entry[j] = larger(piece.entry[j], high.entry[j]); });
  });
  tile.reduce(highs, high, [](T all, T one) { return larger(one, all); });
  for_entries([&](int j) { high.entry[j] = softmax_shift(high.entry[j]); });

  const auto powers = [&](const Entries& piece) {
    Entries out;
    for_entries([&](int j) { out.entry[j] = exp_negative(piece.entry[j] - high.entry[j]); });
    return out;
  };
  const auto add = [](T all, T one) { return all + one; };
  each([&](int64_t t, int i) {
    Entries piece;
    if constexpr (kHeld > 0) {
      piece = held[i] = powers(held[i]);
    } else {
      piece = powers(load(logits, t));
    }
    for_entries([&](int j) { total.entry[j] += piece.entry[j]; });
  });
  tile.reduce(totals, total, add);
  Entries scale;
  for_entries([&](int j) { scale.entry[j] = softmax_scale(total.entry[j]); });

  const auto weight = [&](int64_t t, int i) {
    Entries piece;
    if constexpr (kHeld > 0) {
      piece = held[i];
    } else {
      piece = powers(load(logits, t));
    }
    for_entries([&](int j) { piece.entry[j] *= scale.entry[j]; });
    return piece;
  };
  if constexpr (kBackward) {
    each([&](int64_t t, int i) {
      const Entries w = weight(t, i), d = load(grad, t);
      for_entries([&](int j) { mean.entry[j] = Fused{}(w.entry[j], d.entry[j], mean.entry[j]); });
    });
    tile.reduce(means, mean, add);
  }
  each([&](int64_t t, int i) {
    const Entries w = weight(t, i);
    if constexpr (kBackward) {
      Entries d = load(grad, t);
      for_entries([&](int j) { d.entry[j] = w.entry[j] * (d.entry[j] - mean.entry[j]); });
      store_piece<kEntries>(grad + first + t * S, 0, d);
    }
    Piece<Row, kEntries> piece;
    for_entries([&](int j) { piece.entry[j] = narrow<Row>(w.entry[j]); });
    const int64_t row = tile.group * tokens + t;
    store_piece<kEntries>(weights + row * row_stride<Row>(S) + tile.slot, 0, piece);
  });
}

template <bool kBackward, typename Row>
void softmax(
    const Compute<Row>* logits, Row* weights, Compute<Row>* grad, int64_t G, int64_t tokens,
    int64_t S, bool over_tokens, cudaStream_t stream) {
  using T = Compute<Row>;
  const bool wide = rows_are_wide(logits, S) && rows_are_wide(grad, S);
  const int64_t rows = G * tokens;
  if (over_tokens) {
    constexpr int kEntries = kWideEntries<T>, kHeld = 8;
    auto* kernel = !wide ? tokens_kernel<Row, 1, 0, kBackward>
                   : tokens <= kHeld * SlotTile<T, kEntries>::kDown
                       ? tokens_kernel<Row, kEntries, kHeld, kBackward>
                       : tokens_kernel<Row, kEntries, 0, kBackward>;
    launch(
        kernel, G * ceil_div(S, kWarp), kSoftmaxThreads, 0, stream, logits, weights, grad, tokens,
        S);
  } else if (S > kLongestRow) {
    launch(
        long_slots_kernel<Row, kBackward>, rows, kSoftmaxThreads, 0, stream, logits, weights, grad,
        S);
  } else {
    by_row_length(S, [&](auto shape) {
      using Shape = decltype(shape);
      launch(
          slots_kernel<Row, Shape::kLanes, Shape::kEach, kBackward>,
          ceil_div(rows * Shape::kLanes, kSoftmaxThreads), kSoftmaxThreads, 0, stream, logits,
          weights, grad, S, rows, wide);
    });
  }
}

// Unit: the type that a lane copies at once. The size of Unit depends on the size and address of
// the rows.
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

// Copies rows [G, S, D] to slots [E, G, C, D] if kToSlots, else slots to rows.
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

template <typename Row>
void soft_mix(
    const Compute<Row>* logits, Row* weights, int64_t G, int64_t tokens, int64_t S,
    bool over_tokens, CUstream_st* stream) {
  softmax<false>(
      logits, weights, static_cast<Compute<Row>*>(nullptr), G, tokens, S, over_tokens, stream);
}

template <typename Row>
void soft_mix_backward(
    const Compute<Row>* logits, Row* weights, Compute<Row>* grad, int64_t G, int64_t tokens,
    int64_t S, bool over_tokens, CUstream_st* stream) {
  softmax<true>(logits, weights, grad, G, tokens, S, over_tokens, stream);
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

#define VMOE_INSTANTIATE(Row)                                                                      \
  template void soft_mix(                                                                          \
      const Compute<Row>*, Row*, int64_t, int64_t, int64_t, bool, CUstream_st*);                   \
  template void soft_mix_backward(                                                                 \
      const Compute<Row>*, Row*, Compute<Row>*, int64_t, int64_t, int64_t, bool, CUstream_st*);    \
  template void soft_mix_rows(const Row*, Row*, int64_t, int64_t, int64_t, int64_t, CUstream_st*); \
  template void soft_mix_slots(const Row*, Row*, int64_t, int64_t, int64_t, int64_t, CUstream_st*);
VMOE_EACH_ROW(VMOE_INSTANTIATE)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
