// A line is one row of the result. In means over tokens a line is a slot: the mean of the values of
// all tokens. In means over slots a line is a token: the mean of the values of all slots. A block
// computes up to 128 lines of a group. First it computes their weights, in shared memory. Then it
// multiplies the weights by the values on tensor cores.
//
// Values are copied to shared memory in stages of 32 rows and 128 columns. Shared memory holds two
// stages, so that one stage is copied while the other stage is multiplied. The first stage is
// copied while the weights are computed. Two or three blocks share a multiprocessor, so that one
// block can compute weights while another block multiplies.
//
// The weights in shared memory are exponentials that are not divided by their sums, so they are at
// most 1. Instead the float32 sums of products are scaled at the end.
#include "../common/slots.h"
#include "../soft_mix.h"
#include "softmax.h"
#include "tensor_core.h"

namespace vmoe::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kTile = 16;      // lines, and also rows of values, per instruction
constexpr int kColumns = 128;  // columns of the values per stage
constexpr int kOfWarp = 32;    // columns per warp
constexpr int kStages = 2;
constexpr int kStageRows = 32;
constexpr int kEntries = 8;  // entries in 16 bytes
// The distance between rows in shared memory is an odd multiple of 16 bytes, so that eight adjacent
// rows are in different banks.
constexpr int kStageStride = kColumns + kEntries;
// The most values per line. Longer means are left to cuBLAS (docs/cuda.md says why).
constexpr int64_t kMostValues = 256;
// If there are fewer blocks than this per multiprocessor, the columns of the same lines are divided
// among several blocks. All these blocks compute the same weights. With few blocks, multiprocessors
// would be idle while the last blocks run.
constexpr int64_t kBlocksEach = 6;

struct Mix {
  int64_t G, tokens, S, C;
  int D, depth;           // depth: number of values per line, rounded up to whole tiles
  int64_t line_blocks;    // number of blocks among which the lines of a group are divided
  int64_t column_blocks;  // number of blocks among which the columns of a line are divided
  int columns;            // columns per block
  bool wide;              // whether the logits allow loads of 16 bytes
};

// Two numbers, rounded to 16 bits, in one register.
template <typename Row>
__device__ uint32_t pair(float first, float second) {
  return narrow<Row>(first).bits | uint32_t{narrow<Row>(second).bits} << 16;
}

// Rounds four weights to 16 bits and stores them in one instruction.
template <typename Row>
__device__ void store_weights(Row* to, const Wide<float>& from) {
  *reinterpret_cast<uint2*>(to) =
      uint2{pair<Row>(from.entry[0], from.entry[1]), pair<Row>(from.entry[2], from.entry[3])};
}

// Computes the weights of the slots [first, first + kLines) over the tokens: weights
// [depth, kLines + kEntries], and the factor of each slot in `scales`.
template <int kLines, typename Row>
__device__ void weights_over_tokens(
    const float* __restrict__ logits,  // [tokens, S]
    int64_t first, const Mix& mix, Row* weights, float (&scales)[kLines]) {
  constexpr int kTogether = kWideEntries<float>, kAcross = kLines / kTogether;
  constexpr int kDown = kThreads / kAcross;
  __shared__ float shared[kDown][kLines];
  const int tid = static_cast<int>(threadIdx.x);
  const int column = tid % kAcross * kTogether, down = tid / kAcross;
  const auto load = [&](int t) {
    const int64_t n = t < mix.tokens ? mix.S : 0;
    return load_entries(logits + t * mix.S, first + column, n, mix.wide, kAbsent<float>);
  };
  // Reduces the values of the threads of each column in a fixed order. All threads of a column get
  // its result.
  const auto join = [&](Wide<float>& value, auto&& join) {
    __syncthreads();  // all threads have read `shared` in an earlier call
    if (down < kDown) {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) shared[down][column + j] = value.entry[j];
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      value.entry[j] = shared[0][column + j];
      for (int i = 1; i < kDown; ++i) value.entry[j] = join(value.entry[j], shared[i][column + j]);
    }
  };
  const int end = down < kDown ? mix.depth : 0;  // with 7 tiles, the last threads have no tokens

  Wide<float> high, total = {};
#pragma unroll
  for (int j = 0; j < kTogether; ++j) high.entry[j] = kAbsent<float>;
#pragma unroll 4
  for (int t = down; t < end; t += kDown) {
    const Wide<float> piece = load(t);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) high.entry[j] = larger(piece.entry[j], high.entry[j]);
  }
  join(high, [](float all, float one) { return larger(one, all); });
#pragma unroll
  for (int j = 0; j < kTogether; ++j) high.entry[j] = softmax_shift(high.entry[j]);
#pragma unroll 4
  for (int t = down; t < end; t += kDown) {
    Wide<float> piece = load(t);
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      piece.entry[j] = __expf(piece.entry[j] - high.entry[j]);
      total.entry[j] += piece.entry[j];
    }
    store_weights(weights + t * (kLines + kEntries) + column, piece);
  }
  join(total, [](float all, float one) { return all + one; });
  if (down == 0) {
#pragma unroll
    for (int j = 0; j < kTogether; ++j) scales[column + j] = softmax_scale(total.entry[j]);
  }
}

// Computes the weights of the tokens [first, first + kLines) over the slots: weights
// [kLines, depth + kEntries], and the factor of each token in `scales`.
template <int kLines, typename Row>
__device__ void weights_over_slots(
    const float* __restrict__ logits,  // [tokens, S]
    int64_t first, const Mix& mix, Row* weights, float (&scales)[kLines]) {
  constexpr int kTogether = kWideEntries<float>, kLanes = 8;
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kLanes * kTogether;
  for (int line = tid / kLanes; line < kLines; line += kThreads / kLanes) {
    const bool has_token = first + line < mix.tokens;
    const float* row = logits + (has_token ? first + line : 0) * mix.S;
    const int64_t n = has_token ? mix.S : 0;
    float high = kAbsent<float>, total = 0;
#pragma unroll 4
    for (int s = lane; s < mix.depth; s += kLanes * kTogether) {
      const auto piece = load_entries(row, s, n, mix.wide, kAbsent<float>);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) high = larger(piece.entry[j], high);
    }
    high = softmax_shift(max_of_lanes<kLanes>(high));
#pragma unroll 4
    for (int s = lane; s < mix.depth; s += kLanes * kTogether) {
      auto piece = load_entries(row, s, n, mix.wide, kAbsent<float>);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        piece.entry[j] = __expf(piece.entry[j] - high);
        total += piece.entry[j];
      }
      store_weights(weights + line * (mix.depth + kEntries) + s, piece);
    }
    total = sum_of_lanes<kLanes>(total);
    if (lane == 0) scales[line] = softmax_scale(total);
  }
}

// Transposes pieces among four adjacent lanes: lane i gets pieces[i] of each of the four lanes.
__device__ inline void transpose_fours(uint32_t (&pieces)[4]) {
#pragma unroll
  for (int turn = 1; turn < 4; turn *= 2) {
    const bool upper = threadIdx.x & turn;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & turn) continue;
      const uint32_t kept = upper ? pieces[i + turn] : pieces[i];
      const uint32_t given = upper ? pieces[i] : pieces[i + turn];
      const uint32_t got = __shfl_xor_sync(kAllLanes, given, turn);
      pieces[i] = upper ? got : kept;
      pieces[i + turn] = upper ? kept : got;
    }
  }
}

template <typename Row, bool kOverTokens, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles < 8 ? 3 : 2) mix_kernel(
    const float* __restrict__ logits,  // [G, T, S]
    const Row* __restrict__ values,    // over tokens [G, T, D], else [E, G, C, D]
    Row* __restrict__ out,             // over tokens [E, G, C, D], else [G, T, D]
    Mix mix) {
  constexpr int kLines = kTiles * kTile;
  __shared__ float scales[kLines];
  __shared__ int64_t to_rows[kLines], from_rows[kMostValues];  // rows of out and of values, or -1
  const int tid = static_cast<int>(threadIdx.x), lane = tid % kWarp;
  const int64_t block = blockIdx.x / mix.column_blocks;
  const int64_t group = block / mix.line_blocks, first_line = block % mix.line_blocks * kLines;
  const int first_column = static_cast<int>(blockIdx.x % mix.column_blocks) * mix.columns;
  const int end_column = first_column + mix.columns < mix.D ? first_column + mix.columns : mix.D;

  const auto row_of = [&](bool token, int64_t i) {
    if (i >= (token ? mix.tokens : mix.S)) return int64_t{-1};
    return token ? group * mix.tokens + i : row_of_slot(group, i, mix.G, mix.C);
  };
  for (int i = tid; i < kLines; i += kThreads) to_rows[i] = row_of(!kOverTokens, first_line + i);
  for (int i = tid; i < kMostValues; i += kThreads) from_rows[i] = row_of(kOverTokens, i);
  __syncthreads();

  constexpr int kBytes = sizeof(Row), kStageBytes = kStageRows * kStageStride * kBytes;
  const int stride = (kOverTokens ? kLines : mix.depth) + kEntries;
  Row* weights = dynamic_shared<Row>();
  const Shared stages = shared_place(weights + (kOverTokens ? mix.depth : kLines) * stride);

  // The position of a stage in the values: kStageRows rows from k on, kColumns columns from
  // `column` on. `stage` is the half of the memory.
  struct Step {
    int column, k, stage;

    __device__ Step next(int depth) const {
      const bool last = k + kStageRows >= depth;
      return {last ? column + kColumns : column, last ? 0 : k + kStageRows, 1 - stage};
    }
  };
  const auto fetch = [&](const Step& step) {
    constexpr int kPieces = kColumns / kEntries, kRows = kThreads / kPieces;
    if (step.column < end_column) {
      const int piece = tid % kPieces * kEntries, column = step.column + piece;
#pragma unroll
      for (int i = 0; i < kStageRows; i += kRows) {
        const int row = tid / kPieces + i;
        const int64_t from = from_rows[step.k + row];
        const bool valid = from >= 0 && column < end_column;
        copy_async(
            stages + step.stage * kStageBytes + (row * kStageStride + piece) * kBytes,
            valid ? values + from * mix.D + column : values, valid);
      }
    }
    commit_copies();
  };

  Step step{first_column, 0, 0};
  fetch(step);
  const float* of_group = logits + group * mix.tokens * mix.S;
  if constexpr (kOverTokens) {
    weights_over_tokens<kLines>(of_group, first_line, mix, weights, scales);
  } else {
    weights_over_slots<kLines>(of_group, first_line, mix, weights, scales);
  }

  // The addresses from which this lane loads a (weights) and b (values). b is loaded transposed. In
  // means over tokens the lines are the columns of `weights`, so a is loaded transposed too.
  const int warp_column = tid / kWarp * kOfWarp;
  const Shared a_at = shared_place(weights) +
                      kBytes * (kOverTokens ? (lane % kEntries + lane / kTile * kEntries) * stride +
                                                  lane / kEntries % 2 * kEntries
                                            : lane % kTile * stride + lane / kTile * kEntries);
  const Shared b_at =
      stages + kBytes * (lane % kTile * kStageStride + warp_column + lane / kTile * kEntries);

  float sums[kTiles][4][4] = {};
  const auto multiply = [&](const Step& step) {
#pragma unroll
    for (int i = 0; i < kStageRows; i += kTile) {
      const int k = step.k + i;
      if (k >= mix.depth) break;
      uint32_t b[2][4], a[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load_transposed(
            b[j], b_at + step.stage * kStageBytes + kBytes * (i * kStageStride + j * kTile));
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if constexpr (kOverTokens) {
          load_transposed(a, a_at + kBytes * (k * stride + tile * kTile));
        } else {
          load_matrices(a, a_at + kBytes * (tile * kTile * stride + k));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          multiply_add<Row>(sums[tile][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  };
  const auto store = [&](int column) {
    column += warp_column + lane % 4 * kEntries;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int line = tile * kTile + half * kEntries + lane / 4;
        const int64_t row = to_rows[line];
        const float scale = scales[line];
        uint32_t pieces[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float (&sum)[4] = sums[tile][j];
          pieces[j] = pair<Row>(sum[2 * half] * scale, sum[2 * half + 1] * scale);
          sum[2 * half] = sum[2 * half + 1] = 0;
        }
        transpose_fours(pieces);
        if (row >= 0 && column < end_column) {
          *reinterpret_cast<uint4*>(out + row * mix.D + column) =
              uint4{pieces[0], pieces[1], pieces[2], pieces[3]};
        }
      }
    }
  };

  while (step.column < end_column) {
    await_copies<0>();
    __syncthreads();  // the weights and this stage are written; the previous stage was multiplied
    const Step coming = step.next(mix.depth);
    fetch(coming);
    multiply(step);
    if (coming.k == 0) store(step.column);
    step = coming;
  }
}

template <typename Row>
struct Kernel {
  int tiles;
  void (*over_tokens)(const float*, const Row*, Row*, Mix);
  void (*over_slots)(const float*, const Row*, Row*, Mix);

  int64_t lines() const { return tiles * kTile; }
  size_t shared(int64_t depth, bool tokens) const {
    const int64_t weights = tokens ? depth * (lines() + kEntries) : lines() * (depth + kEntries);
    return (weights + kStages * kStageRows * kStageStride) * sizeof(Row);
  }
};

}  // namespace

template <typename Row>
bool soft_mix_product(
    const float* logits, const Row* values, Row* out, int64_t G, int64_t tokens, int64_t E,
    int64_t C, int64_t D, bool over_tokens, CUstream_st* stream) {
  const int64_t S = E * C, count = over_tokens ? tokens : S, lines = over_tokens ? S : tokens;
  if (count < 1 || count > kMostValues || !in_wide_pieces<Row>(D, values, out)) return false;
  const int64_t depth = ceil_div(count, kTile) * kTile;

  // Chooses the kernel with the fewest padding lines, among the kernels that fit in shared memory.
  constexpr Kernel<Row> kKernels[] = {
      {8, mix_kernel<Row, true, 8>, mix_kernel<Row, false, 8>},
      {7, mix_kernel<Row, true, 7>, mix_kernel<Row, false, 7>},
      {4, mix_kernel<Row, true, 4>, mix_kernel<Row, false, 4>}};
  const auto padded = [&](const Kernel<Row>& kernel) {
    return ceil_div(lines, kernel.lines()) * kernel.lines();
  };
  const int64_t limit = shared_limit();
  const Kernel<Row>* best = nullptr;
  for (const Kernel<Row>& kernel : kKernels) {
    if (static_cast<int64_t>(kernel.shared(depth, over_tokens)) > limit) continue;
    if (!best || padded(kernel) < padded(*best)) best = &kernel;
  }
  if (!best) return false;

  const int64_t line_blocks = ceil_div(lines, best->lines()), tiles = ceil_div(D, kColumns);
  const int64_t blocks = G * line_blocks;
  if (blocks == 0 || D == 0) return true;
  const int64_t splits = std::min(tiles, ceil_div(kBlocksEach * multiprocessors(), blocks));
  const int64_t columns = ceil_div(tiles, splits) * kColumns;
  const Mix mix{
      G,
      tokens,
      S,
      C,
      static_cast<int>(D),
      static_cast<int>(depth),
      line_blocks,
      ceil_div(D, columns),
      static_cast<int>(columns),
      rows_are_wide(logits, S)};
  launch(
      over_tokens ? best->over_tokens : best->over_slots, blocks * mix.column_blocks, kThreads,
      best->shared(depth, over_tokens), stream, logits, values, out, mix);
  return true;
}

#define VMOE_INSTANTIATE(Row)                                                                      \
  template bool soft_mix_product(                                                                  \
      const float*, const Row*, Row*, int64_t, int64_t, int64_t, int64_t, int64_t, bool,           \
      CUstream_st*);
VMOE_INSTANTIATE(BFloat16)
VMOE_INSTANTIATE(Float16)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
