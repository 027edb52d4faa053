// A block computes kTileRows rows and kColumns columns of an expert. Each lane has one piece of the
// columns. Each warp takes every kWarps-th row. A thread keeps the bias and the sums of its columns
// in registers.
#include <type_traits>

#include "../common/gelu.h"
#include "../grouped_mlp.h"
#include "rows.h"
#include "scalar.h"

namespace vmoe::cuda {
namespace {

constexpr int kWarps = kRowThreads / kWarp;
constexpr int64_t kTileRows = 32;

__host__ __device__ inline int64_t tiles_down(const ExpertRows& rows) {
  return ceil_div(rows.N, kTileRows);
}

// The rows and columns of a block. Sums over the rows of an expert take two steps with a fixed
// order: each block writes the sums of its rows to parts [E, tiles_down, columns], and
// sum_parts_kernel adds up the parts.
template <typename Row, int kEntries>
struct Tile {
  using T = Compute<Row>;
  static constexpr int kColumns = kWarp * kEntries;

  ExpertRows rows;
  int64_t columns, e, down, piece, first_column;
  int warp, lane;

  __device__ Tile(const ExpertRows& rows_, int64_t columns_) : rows(rows_), columns(columns_) {
    const int64_t across = ceil_div(columns, kColumns), tiles = tiles_down(rows);
    warp = static_cast<int>(threadIdx.x) / kWarp;
    lane = lane_of_warp();
    e = blockIdx.x / across / tiles;
    down = blockIdx.x / across % tiles;
    first_column = blockIdx.x % across * kColumns;
    piece = first_column / kEntries + lane;
  }

  // Calls body(row, filled) for every row of this thread. `row` is its index in [E, N].
  template <typename Body>
  __device__ void each(Body&& body) const {
    if (piece >= columns / kEntries) return;
    const int64_t begin = down * kTileRows, C = rows.N / rows.G;
    const int64_t end = begin + kTileRows < rows.N ? begin + kTileRows : rows.N;
    int64_t n = begin + warp, segment = n / C, place = n % C;
    for (; n < end; n += kWarps, place += kWarps) {
      for (; place >= C; place -= C) ++segment;
      body(e * rows.N + n, !rows.filled || place < rows.filled[e * rows.G + segment]);
    }
  }

  __device__ void read_bias(const Row* bias, T (&to)[kEntries]) const {
    if (!bias || piece >= columns / kEntries) return;
    const auto from = load_piece<kEntries>(bias + e * columns, piece);
#pragma unroll
    for (int d = 0; d < kEntries; ++d) to[d] = widen(from.entry[d]);
  }

  __device__ void write_sums(const T (&sums)[kEntries], T* parts) const {
    __shared__ T of_warps[kWarps][kEntries][kWarp + 1];
#pragma unroll
    for (int d = 0; d < kEntries; ++d) of_warps[warp][d][lane] = sums[d];
    __syncthreads();
    const int i = static_cast<int>(threadIdx.x);
    if (i >= kColumns || first_column + i >= columns) return;
    T sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w][i % kEntries][i / kEntries];
    parts[(e * tiles_down(rows) + down) * columns + first_column + i] = sum;
  }
};

template <typename Row, int kEntries, bool kTanh>
__global__ void __launch_bounds__(kRowThreads, sizeof(Row) < sizeof(double) ? 5 : 4)
    bias_gelu_kernel(
        const Row* x,                  // [E, N, columns]
        const Row* __restrict__ bias,  // [E, columns] or null
        Row* out,                      // [E, N, columns]; may be x
        ExpertRows rows, int64_t columns) {
  const Tile<Row, kEntries> tile(rows, columns);
  Compute<Row> b[kEntries] = {};
  tile.read_bias(bias, b);
  tile.each([&](int64_t row, bool filled) {
    Piece<Row, kEntries> to = {};
    if (filled) {
      const auto from = load_piece<kEntries>(x + row * columns, tile.piece);
#pragma unroll
      for (int d = 0; d < kEntries; ++d) {
        const Compute<Row> sum = widen(from.entry[d]) + b[d];
        to.entry[d] = narrow<Row>(gelu<kTanh, Compute<Row>>(sum, Fused{}, Exp{}).value);
      }
    }
    store_piece<kEntries>(out + row * columns, tile.piece, to);
  });
}

template <typename Row, int kEntries, bool kTanh>
__global__ void __launch_bounds__(kRowThreads) bias_gelu_backward_kernel(
    const Row* x,                  // [E, N, columns]
    const Row* __restrict__ bias,  // [E, columns] or null
    Row* out,                      // [E, N, columns] or null; may be x
    Row* __restrict__ grad,        // [E, N, columns]
    Compute<Row>* __restrict__ parts, ExpertRows rows, int64_t columns) {
  const Tile<Row, kEntries> tile(rows, columns);
  Compute<Row> b[kEntries] = {}, sums[kEntries] = {};
  tile.read_bias(bias, b);
  tile.each([&](int64_t row, bool filled) {
    Piece<Row, kEntries> value = {}, to = {};
    if (filled) {
      const auto from = load_piece<kEntries>(x + row * columns, tile.piece);
      const auto by = load_piece<kEntries>(grad + row * columns, tile.piece);
#pragma unroll
      for (int d = 0; d < kEntries; ++d) {
        const Compute<Row> sum = widen(from.entry[d]) + b[d];
        const auto at = gelu<kTanh, Compute<Row>>(sum, Fused{}, Exp{});
        const Compute<Row> g = widen(by.entry[d]) * at.slope;
        value.entry[d] = narrow<Row>(at.value);
        to.entry[d] = narrow<Row>(g);
        sums[d] += g;
      }
    }
    if (out) store_piece<kEntries>(out + row * columns, tile.piece, value);
    store_piece<kEntries>(grad + row * columns, tile.piece, to);
  });
  if (parts) tile.write_sums(sums, parts);
}

template <typename Row, int kEntries>
__global__ void __launch_bounds__(kRowThreads) add_bias_kernel(
    Row* __restrict__ y,           // [E, N, columns]
    const Row* __restrict__ bias,  // [E, columns] or null
    ExpertRows rows, int64_t columns) {
  const Tile<Row, kEntries> tile(rows, columns);
  Compute<Row> b[kEntries] = {};
  tile.read_bias(bias, b);
  tile.each([&](int64_t row, bool filled) {
    Piece<Row, kEntries> to = {};
    if (filled) {
      to = load_piece<kEntries>(y + row * columns, tile.piece);
#pragma unroll
      for (int d = 0; d < kEntries; ++d) to.entry[d] = narrow<Row>(widen(to.entry[d]) + b[d]);
    }
    store_piece<kEntries>(y + row * columns, tile.piece, to);
  });
}

template <typename Row, int kEntries>
__global__ void __launch_bounds__(kRowThreads) sum_rows_kernel(
    const Row* __restrict__ x,  // [E, N, columns]
    Row* __restrict__ out,      // [E, N, columns] or null
    Compute<Row>* __restrict__ parts, ExpertRows rows, int64_t columns) {
  const Tile<Row, kEntries> tile(rows, columns);
  Compute<Row> sums[kEntries] = {};
  tile.each([&](int64_t row, bool filled) {
    Piece<Row, kEntries> from = {};
    if (filled) {
      from = load_piece<kEntries>(x + row * columns, tile.piece);
#pragma unroll
      for (int d = 0; d < kEntries; ++d) sums[d] += widen(from.entry[d]);
    }
    if (out) store_piece<kEntries>(out + row * columns, tile.piece, from);
  });
  tile.write_sums(sums, parts);
}

// Adds up the parts. A block computes 32 columns of an expert. Each warp adds every kWarps-th part.
template <typename Row>
__global__ void __launch_bounds__(kRowThreads) sum_parts_kernel(
    const Compute<Row>* __restrict__ parts,  // [E, tiles, columns]
    Row* __restrict__ sum,                   // [E, columns]
    int64_t tiles, int64_t columns) {
  using T = Compute<Row>;
  __shared__ T of_warps[kWarps][kWarp];
  const int64_t across = ceil_div(columns, kWarp), e = blockIdx.x / across;
  const int64_t column = blockIdx.x % across * kWarp + lane_of_warp();
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  T total = 0;
  if (column < columns) {
#pragma unroll 4
    for (int64_t i = warp; i < tiles; i += kWarps)
      total += parts[(e * tiles + i) * columns + column];
  }
  of_warps[warp][lane_of_warp()] = total;
  __syncthreads();
  if (warp > 0 || column >= columns) return;
  for (int w = 1; w < kWarps; ++w) total += of_warps[w][lane_of_warp()];
  sum[e * columns + column] = narrow<Row>(total);
}

// Launches kernel(entries), where a lane loads `entries` entries at once: 16 bytes if `wide`, else
// one entry.
template <typename Row, typename Kernel, typename... Args>
void launch_tiles(
    Kernel&& kernel, bool wide, const ExpertRows& rows, int64_t columns, cudaStream_t stream,
    Args... args) {
  const auto with = [&](auto entries) {
    const int64_t across = ceil_div(columns, kWarp * entries());
    launch(
        kernel(entries), rows.E * tiles_down(rows) * across, kRowThreads, 0, stream, args..., rows,
        columns);
  };
  if (wide) {
    with(std::integral_constant<int, kWideEntries<Row>>{});
  } else {
    with(std::integral_constant<int, 1>{});
  }
}

template <typename Row>
void sum_parts(
    const Compute<Row>* parts, Row* sum, const ExpertRows& rows, int64_t columns,
    cudaStream_t stream) {
  launch(
      sum_parts_kernel<Row>, rows.E * ceil_div(columns, kWarp), kRowThreads, 0, stream, parts, sum,
      tiles_down(rows), columns);
}

}  // namespace

template <typename Row>
size_t sum_workspace(const ExpertRows& rows, int64_t columns) {
  return static_cast<size_t>(rows.E * tiles_down(rows) * columns) * sizeof(Compute<Row>);
}

template <typename Row>
void bias_gelu(
    const Row* x, const Row* bias, Row* out, const ExpertRows& rows, int64_t columns, bool tanh,
    CUstream_st* stream) {
  const auto kernel = [&](auto entries) {
    constexpr int kEntries = decltype(entries)::value;
    return tanh ? bias_gelu_kernel<Row, kEntries, true> : bias_gelu_kernel<Row, kEntries, false>;
  };
  launch_tiles<Row>(
      kernel, in_wide_pieces<Row>(columns, x, bias, out), rows, columns, stream, x, bias, out);
}

template <typename Row>
void bias_gelu_backward(
    const Row* x, const Row* bias, Row* out, Row* grad, Row* grad_bias, void* workspace,
    const ExpertRows& rows, int64_t columns, bool tanh, CUstream_st* stream) {
  auto* parts = static_cast<Compute<Row>*>(grad_bias ? workspace : nullptr);
  const auto kernel = [&](auto entries) {
    constexpr int kEntries = decltype(entries)::value;
    return tanh ? bias_gelu_backward_kernel<Row, kEntries, true>
                : bias_gelu_backward_kernel<Row, kEntries, false>;
  };
  launch_tiles<Row>(
      kernel, in_wide_pieces<Row>(columns, x, bias, out, grad), rows, columns, stream, x, bias, out,
      grad, parts);
  if (grad_bias) sum_parts<Row>(parts, grad_bias, rows, columns, stream);
}

template <typename Row>
void add_bias(
    Row* y, const Row* bias, const ExpertRows& rows, int64_t columns, CUstream_st* stream) {
  if (!bias && !rows.filled) return;
  const auto kernel = [&](auto entries) { return add_bias_kernel<Row, decltype(entries)::value>; };
  launch_tiles<Row>(kernel, in_wide_pieces<Row>(columns, y, bias), rows, columns, stream, y, bias);
}

template <typename Row>
void sum_rows(
    const Row* x, Row* out, Row* sum, void* workspace, const ExpertRows& rows, int64_t columns,
    CUstream_st* stream) {
  auto* parts = static_cast<Compute<Row>*>(workspace);
  const auto kernel = [&](auto entries) { return sum_rows_kernel<Row, decltype(entries)::value>; };
  launch_tiles<Row>(
      kernel, in_wide_pieces<Row>(columns, x, out), rows, columns, stream, x, out, parts);
  sum_parts<Row>(parts, sum, rows, columns, stream);
}

#define VMOE_INSTANTIATE(Row)                                                                      \
  template size_t sum_workspace<Row>(const ExpertRows&, int64_t);                                  \
  template void bias_gelu(                                                                         \
      const Row*, const Row*, Row*, const ExpertRows&, int64_t, bool, CUstream_st*);               \
  template void bias_gelu_backward(                                                                \
      const Row*, const Row*, Row*, Row*, Row*, void*, const ExpertRows&, int64_t, bool,           \
      CUstream_st*);                                                                               \
  template void add_bias(Row*, const Row*, const ExpertRows&, int64_t, CUstream_st*);              \
  template void sum_rows(const Row*, Row*, Row*, void*, const ExpertRows&, int64_t, CUstream_st*);
VMOE_EACH_ROW(VMOE_INSTANTIATE)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
