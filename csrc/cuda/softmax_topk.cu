// Three kernels choose up to kFew picks in one launch, and do not write the gates to device memory:
//
//   few_of_rows       tokens choose, E <= 1024: kLanes lanes per token, which hold its gates in
//                     registers
//   few_of_long_rows  tokens choose, E <= 4096: one block per token. Each warp chooses from a part
//                     of the row, then one warp chooses from these choices
//   few_of_columns    experts choose, E <= 128, T <= 1024: one block per group, if the gates of the
//                     group fit in its shared memory. One warp per expert chooses
//
// All other choices write the gates to device memory, call topk, and then remove the picks of
// masked tokens.
#include <algorithm>

#include "../softmax_topk.h"
#include "../topk.h"
#include "softmax.h"

namespace vmoe::cuda {
namespace {

// order_key (common/order.h) of the gates of a row, in one instruction. The gates of a row are at
// least +0, except if the scale of the row is NaN. Then all its gates are NaN.
template <typename T>
class GateKeys {
 public:
  using Key = OrderKey<T>;
  explicit __device__ GateKeys(T scale) : set_(scale == scale ? kTop : ~Key{0}) {}

  __device__ Key operator()(T gate) const {
    Key bits;
    memcpy(&bits, &gate, sizeof(bits));
    return bits | set_;
  }
  static __device__ T gate(Key key) {
    key &= ~kTop;
    T gate;
    memcpy(&gate, &key, sizeof(gate));
    return gate;
  }

 private:
  static constexpr Key kTop = Key{1} << (8 * sizeof(Key) - 1);
  Key set_;  // the bits to set
};

template <typename T>
struct Chosen {
  T* values;         // [rows, k]
  int32_t* indices;  // [rows, k]
  int64_t k;

  __device__ void write(int64_t row, int64_t j, T value, int32_t index) const {
    values[row * k + j] = value;
    indices[row * k + j] = index;
  }
  __device__ int count() const { return static_cast<int>(k); }
};

template <typename T, int kLanes, int kEach>
__global__ void __launch_bounds__(kSoftmaxThreads) few_of_rows_kernel(
    const T* __restrict__ logits,  // [rows, E]
    Chosen<T> chosen,
    T* __restrict__ high,   // [rows]
    T* __restrict__ scale,  // [rows]
    int E, int64_t rows, bool wide) {
  using Softmax = RowSoftmax<T, kLanes, kEach, true>;
  const int64_t row = (int64_t{blockIdx.x} * kSoftmaxThreads + threadIdx.x) / kLanes;
  Softmax softmax;
  // Lanes without a row read the last row: all lanes of a warp must take part in its shuffles.
  softmax.read(logits + (row < rows ? row : rows - 1) * E, E, wide);
  typename Softmax::Picks few;
  // Positions after the end of the row have the gate 0, or NaN like the row. These positions are
  // never picked, because they come after the E entries of the row, of which k <= E are picked.
  const GateKeys<T> key_of(softmax.scale);
#pragma unroll
  for (int i = 0; i < kEach; ++i) few.keys[i] = key_of(softmax.gate(i));
  const bool writes = row < rows && few.lane() == 0, absent = softmax.absent();
  if (writes) {
    high[row] = softmax.high;
    scale[row] = softmax.scale;
  }
  few.select(chosen.count(), [&](int j, const auto& pick) {
    const T gate = absent ? T{0} : key_of.gate(pick.key);
    if (writes) chosen.write(row, j, gate, absent ? -1 : pick.index);
  });
}

constexpr int kWarps = kSoftmaxThreads / kWarp;
constexpr int kEachOfLong = 16;
constexpr int64_t kLongestChoice = int64_t{kSoftmaxThreads} * kEachOfLong;

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads) few_of_long_rows_kernel(
    const T* __restrict__ logits,  // [rows, E]
    Chosen<T> chosen,
    T* __restrict__ high,   // [rows]
    T* __restrict__ scale,  // [rows]
    int E) {
  using Key = OrderKey<T>;
  // Ordered by warp, then by rank within the warp: ties are then in the order of their indices.
  __shared__ Pick<Key> candidates[kWarps * kFew];
  const int64_t row = blockIdx.x;
  const int k = chosen.count();
  const T* from = logits + row * E;
  const Norms<T> norms = norms_of_block(from, E);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  constexpr int kPart = kWarp * kEachOfLong;
  const GateKeys<T> key_of(norms.scale);
  Few<Key, kWarp, kEachOfLong, 1> few;
#pragma unroll
  for (int i = 0; i < kEachOfLong; ++i) {
    const int e = warp * kPart + few.index(i);
    few.keys[i] = e < E ? key_of(exp_negative(from[e] - norms.high) * norms.scale) : 0;
  }
  few.select(k, [&](int j, const Pick<Key>& pick) {
    if (few.lane() == 0) candidates[warp * k + j] = pick;
  });
  __syncthreads();
  if (warp > 0) return;
  Few<Key, kWarp, kWarps * kFew / kWarp, 1> best;
#pragma unroll
  for (int i = 0; i < kWarps * kFew / kWarp; ++i) {
    best.keys[i] = best.index(i) < kWarps * k ? candidates[best.index(i)].key : 0;
  }
  best.select(k, [&](int j, const Pick<Key>& pick) {
    if (best.lane() > 0) return;
    const bool absent = norms.scale == 0;
    const int32_t e = pick.index / k * kPart + candidates[pick.index].index;
    chosen.write(row, j, absent ? T{0} : key_of.gate(pick.key), absent ? -1 : e);
  });
  if (best.lane() == 0) {
    high[row] = norms.high;
    scale[row] = norms.scale;
  }
}

constexpr int kColumnThreads = 512;
// Blocks per multiprocessor, which limit the registers. A multiprocessor has 1536 threads from
// compute capability 11.0 on and on 8.6, 8.7 and 8.9, and 2048 threads on 8.0, 9.0 and 10.x.
#if defined(__CUDA_ARCH__) &&                                                                      \
    (__CUDA_ARCH__ >= 1100 || (__CUDA_ARCH__ > 800 && __CUDA_ARCH__ < 900))
[[maybe_unused]] constexpr int kColumnBlocks = 3;
#else
[[maybe_unused]] constexpr int kColumnBlocks = 4;
#endif
constexpr int64_t kMostExperts = 128;

// Writes the gates of `count` tokens to `tile` in shared memory, one row per expert. The gates of
// a masked token are -inf. All threads of a block of kColumnThreads threads must call this.
template <typename T, int kLanes, int kEach>
__device__ void gates_to_tile(
    const T* __restrict__ logits,  // [count, E]
    T* tile,                       // [E, stride]
    T* __restrict__ high,          // [count]
    T* __restrict__ scale,         // [count]
    int count, int E, int stride, bool wide) {
  using Softmax = RowSoftmax<T, kLanes, kEach, true>;
  const int own = static_cast<int>(threadIdx.x) / kLanes;
  for (int begin = 0; begin < count; begin += kColumnThreads / kLanes) {
    const bool has_token = begin + own < count;
    // All lanes of a warp must take part in the shuffles of `read`.
    const int t = has_token ? begin + own : count - 1;
    Softmax softmax;
    softmax.read(logits + t * E, E, wide);
    if (!has_token) continue;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int32_t e = Softmax::Picks::index(i);
      if (e < E) tile[e * stride + t] = softmax.absent() ? kAbsent<T> : softmax.gate(i);
    }
    if (threadIdx.x % kLanes == 0) {
      high[t] = softmax.high;
      scale[t] = softmax.scale;
    }
  }
  __syncthreads();
}

// kTokens: tokens per lane, when a warp chooses for an expert.
template <typename T, int kLanes, int kEach, int kTokens>
__global__ void __launch_bounds__(
    kColumnThreads, sizeof(T) == 4 && kTokens == 8 ? kColumnBlocks : 0)
    few_of_columns_kernel(
        const T* __restrict__ logits,  // [G, T, E]
        Chosen<T> chosen,              // rows: [G, E]
        T* __restrict__ high,          // [G, T]
        T* __restrict__ scale,         // [G, T]
        int tokens, int E, bool wide) {
  T* tile = dynamic_shared<T>();  // [E, tokens | 1]; an odd stride avoids bank conflicts
  const int stride = tokens | 1;
  const int64_t g = blockIdx.x, first = g * tokens;
  gates_to_tile<T, kLanes, kEach>(
      logits + first * E, tile, high + first, scale + first, tokens, E, stride, wide);
  for (int e = static_cast<int>(threadIdx.x) / kWarp; e < E; e += kColumnThreads / kWarp) {
    const T* gates = tile + e * stride;
    Few<OrderKey<T>, kWarp, kTokens, 1> few;
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      few.keys[i] = few.index(i) < tokens ? order_key(gates[few.index(i)]) : 0;
    }
    few.select(chosen.count(), [&](int j, const auto& pick) {
      if (few.lane() > 0) return;
      const T gate = gates[pick.index];
      const bool absent = gate == kAbsent<T>;
      chosen.write(g * E + e, j, absent ? T{0} : gate, absent ? -1 : pick.index);
    });
  }
}

// Writes the gates by expert to device memory, through shared memory. kChunk tokens per block.
constexpr int kChunk = 64;

template <typename T, int kLanes, int kEach>
__global__ void __launch_bounds__(kColumnThreads) gates_by_expert_kernel(
    const T* __restrict__ logits,  // [G, T, E]
    T* __restrict__ high,          // [G, T]
    T* __restrict__ scale,         // [G, T]
    T* __restrict__ gates,         // [G, E, T]
    int64_t tokens, int64_t E, bool wide) {
  constexpr int kStride = kChunk + 1;
  T* tile = dynamic_shared<T>();  // [E, kStride]
  const int64_t chunks = ceil_div(tokens, kChunk);
  const int64_t g = blockIdx.x / chunks, t = blockIdx.x % chunks * kChunk, first = g * tokens + t;
  const int count = static_cast<int>(tokens - t < kChunk ? tokens - t : kChunk);
  gates_to_tile<T, kLanes, kEach>(
      logits + first * E, tile, high + first, scale + first, count, static_cast<int>(E), kStride,
      wide);
  const int column = static_cast<int>(threadIdx.x) % kChunk;
  if (column >= count) return;
  for (int64_t e = threadIdx.x / kChunk; e < E; e += kColumnThreads / kChunk) {
    gates[(g * E + e) * tokens + t + column] = tile[e * kStride + column];
  }
}

// Writes the gates of all tokens to device memory. The gates of a masked token are -inf. Each
// block of 32 x 8 threads writes a tile of 32 x 32 gates, transposed if the gates are stored by
// expert.
constexpr int kTile = 32;

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads) gates_kernel(
    const T* __restrict__ logits,  // [G, T, E]
    const T* __restrict__ high,    // [G, T]
    const T* __restrict__ scale,   // [G, T]
    T* __restrict__ gates,         // [G, T, E], or by expert [G, E, T]
    int64_t tokens, int64_t E, bool by_expert) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t down = ceil_div(tokens, kTile), across = ceil_div(E, kTile);
  const int64_t g = blockIdx.x / (down * across);
  const int64_t t = blockIdx.x / across % down * kTile, e = blockIdx.x % across * kTile;
  const int column = static_cast<int>(threadIdx.x) % kTile;
  const int above = static_cast<int>(threadIdx.x) / kTile;
  constexpr int kRows = kSoftmaxThreads / kTile;
  for (int row = above; row < kTile; row += kRows) {
    if (t + row >= tokens || e + column >= E) continue;
    const int64_t token = g * tokens + t + row, at = token * E + e + column;
    const T by = scale[token];
    const T gate = by == 0 ? kAbsent<T> : exp_negative(logits[at] - high[token]) * by;
    if (by_expert) {
      tile[row][column] = gate;
    } else {
      gates[at] = gate;
    }
  }
  if (!by_expert) return;
  __syncthreads();
  for (int row = above; row < kTile; row += kRows) {
    if (e + row < E && t + column < tokens) {
      gates[(g * E + e + row) * tokens + t + column] = tile[column][row];
    }
  }
}

// Replaces the picks of masked tokens, which have the gate -inf, by index -1 and value 0.
template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads)
    remove_absent_kernel(T* __restrict__ values, int32_t* __restrict__ indices, int64_t size) {
  const int64_t i = int64_t{blockIdx.x} * kSoftmaxThreads + threadIdx.x;
  if (i >= size || values[i] != kAbsent<T>) return;
  values[i] = 0;
  indices[i] = -1;
}

// Calls body(RowShape) with the template arguments of gates_to_tile for E <= kMostExperts.
template <typename Body>
void with_experts_in_tile(int64_t E, Body&& body) {
  by_row_length(E, [&](auto shape) {
    if constexpr (decltype(shape)::kLanes * decltype(shape)::kEach <= kMostExperts) body(shape);
  });
}

// The kernel and the workspace for a shape. softmax_topk_workspace and softmax_topk both use this
// struct, so that they agree on the size of the workspace.
template <typename T>
struct Layout {
  enum class Way { kFewOfRows, kFewOfLongRows, kFewOfColumns, kMemory };

  Layout(int64_t G, int64_t tokens, int64_t E, int64_t k, bool of_tokens, void* memory)
      : n(of_tokens ? tokens : E), rows(G * (of_tokens ? E : tokens)) {
    constexpr int64_t kMostTokens = 1024;
    tile = E * (tokens | 1) * static_cast<int64_t>(sizeof(T));
    if (k <= kFew && !of_tokens && E <= kLongestChoice) {
      way = E > kLongestRow ? Way::kFewOfLongRows : Way::kFewOfRows;
    } else if (
        k <= kFew && of_tokens && E <= kMostExperts && tokens <= kMostTokens &&
        tile <= shared_limit()) {
      way = Way::kFewOfColumns;
    } else {
      Workspace workspace(memory);
      gates = workspace.take<T>(G * tokens * E);
      of_topk = workspace.take<char>(static_cast<int64_t>(topk_workspace<T>(n, 1, k, rows)));
      bytes = workspace.size();
    }
  }

  int64_t n, rows;  // `rows` choices, each among n entries
  Way way = Way::kMemory;
  int64_t tile = 0;         // bytes of shared memory of few_of_columns
  T* gates = nullptr;       // [G, T, E], or by expert [G, E, T]
  char* of_topk = nullptr;  // the workspace of topk
  size_t bytes = 0;
};

// Writes the gates to device memory, calls topk, and removes the picks of masked tokens.
template <typename T>
void by_memory(
    const Layout<T>& layout, const T* logits, const Chosen<T>& chosen, T* high, T* scale, int64_t G,
    int64_t tokens, int64_t E, bool of_tokens, cudaStream_t stream) {
  if (of_tokens && E <= kMostExperts) {
    with_experts_in_tile(E, [&](auto shape) {
      constexpr int kLanes = decltype(shape)::kLanes, kEach = decltype(shape)::kEach;
      launch(
          gates_by_expert_kernel<T, kLanes, kEach>, G * ceil_div(tokens, kChunk), kColumnThreads,
          static_cast<size_t>(E * (kChunk + 1)) * sizeof(T), stream, logits, high, scale,
          layout.gates, tokens, E, rows_are_wide(logits, E));
    });
  } else {
    softmax_norms(logits, high, scale, E, G * tokens, stream);
    launch(
        gates_kernel<T>, G * ceil_div(tokens, kTile) * ceil_div(E, kTile), kSoftmaxThreads, 0,
        stream, logits, high, scale, layout.gates, tokens, E, of_tokens);
  }
  topk<T>(
      layout.gates, chosen.values, chosen.indices, layout.n, 1, chosen.k, layout.rows,
      layout.of_topk, stream);
  launch(
      remove_absent_kernel<T>, ceil_div(layout.rows * chosen.k, kSoftmaxThreads), kSoftmaxThreads,
      0, stream, chosen.values, chosen.indices, layout.rows * chosen.k);
}

}  // namespace

template <typename T>
size_t softmax_topk_workspace(int64_t G, int64_t tokens, int64_t E, int64_t k, bool of_tokens) {
  return Layout<T>(G, tokens, E, k, of_tokens, nullptr).bytes;
}

template <typename T>
void softmax_topk(
    const T* logits, T* values, int32_t* indices, T* high, T* scale, int64_t G, int64_t tokens,
    int64_t E, int64_t k, bool of_tokens, void* workspace, CUstream_st* stream) {
  using Way = typename Layout<T>::Way;
  const Layout<T> layout(G, tokens, E, k, of_tokens, workspace);
  const Chosen<T> chosen{values, indices, k};
  const bool wide = rows_are_wide(logits, E);
  switch (layout.way) {
    case Way::kFewOfRows:
      return by_row_length(E, [&](auto shape) {
        using Shape = decltype(shape);
        launch(
            few_of_rows_kernel<T, Shape::kLanes, Shape::kEach>,
            ceil_div(layout.rows * Shape::kLanes, kSoftmaxThreads), kSoftmaxThreads, 0, stream,
            logits, chosen, high, scale, static_cast<int>(E), layout.rows, wide);
      });
    case Way::kFewOfLongRows:
      return launch(
          few_of_long_rows_kernel<T>, layout.rows, kSoftmaxThreads, 0, stream, logits, chosen, high,
          scale, static_cast<int>(E));
    case Way::kFewOfColumns:
      return with_experts_in_tile(E, [&](auto shape) {
        constexpr int kLanes = decltype(shape)::kLanes, kEach = decltype(shape)::kEach;
        launch(
            tokens <= 256 ? few_of_columns_kernel<T, kLanes, kEach, 8>
                          : few_of_columns_kernel<T, kLanes, kEach, 32>,
            G, kColumnThreads, static_cast<size_t>(layout.tile), stream, logits, chosen, high,
            scale, static_cast<int>(tokens), static_cast<int>(E), wide);
      });
    case Way::kMemory:
      return by_memory(layout, logits, chosen, high, scale, G, tokens, E, of_tokens, stream);
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template size_t softmax_topk_workspace<T>(int64_t, int64_t, int64_t, int64_t, bool);             \
  template void softmax_topk(                                                                      \
      const T*, T*, int32_t*, T*, T*, int64_t, int64_t, int64_t, int64_t, bool, void*,             \
      CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
