// The kernels before and after torch's matrix product, with one warp per row (a token, or a row of
// phi).
#include "../common/row_stride.h"
#include "../soft_logits.h"
#include "rows.h"

namespace vmoe::cuda {
namespace {

// The dot product of two rows in float64, as on the CPU. All lanes get the result.
template <int kEntries, typename Row>
__device__ double dot_of_warp(const Row* a, const Row* b, int64_t D) {
  double total = 0;
#pragma unroll 4
  for (int64_t piece = lane_of_warp(); piece < D / kEntries; piece += kWarp) {
    const auto from_a = load_piece<kEntries>(a, piece), from_b = load_piece<kEntries>(b, piece);
#pragma unroll
    for (int d = 0; d < kEntries; ++d) {
      const auto one = static_cast<double>(widen(from_a.entry[d]));
      total = fma(one, static_cast<double>(widen(from_b.entry[d])), total);
    }
  }
  for (int turn = kWarp / 2; turn > 0; turn /= 2) total += __shfl_xor_sync(kAllLanes, total, turn);
  return total;
}

// The factor r of soft_logits.h: 1 / sqrt(|x|^2 + 1e-6).
template <int kEntries, typename Row>
__device__ double inverse_norm(const Row* x, int64_t D) {
  return 1 / sqrt(dot_of_warp<kEntries>(x, x, D) + 1e-6);
}

template <typename Row>
__global__ void __launch_bounds__(kRowThreads) parts_kernel(
    const Compute<Row>* __restrict__ phi,  // [D, S]
    Row* __restrict__ parts,               // [D, 2, row_stride]
    int64_t D, int64_t S, bool wide) {
  using T = Compute<Row>;
  constexpr int kEntries = kWideEntries<T>;
  const int64_t row = row_of_warp(), stride = row_stride<Row>(S);
  if (row >= D) return;
  Row* to = parts + row * 2 * stride;
  for (int64_t s = lane_of_warp() * kEntries; s < stride; s += kWarp * kEntries) {
    const Wide<T> high = load_entries(phi + row * S, s, S, wide, T{0});
    Wide<T> low;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
      const T rest = high.entry[i] - widen(narrow<Row>(high.entry[i]));
      low.entry[i] = rest - rest == 0 ? rest : T{0};  // if not finite, high alone has the value
    }
    store_entries(to, s, stride, true, high);
    store_entries(to + stride, s, stride, true, low);
  }
}

// scaled = r * the sum of kParts products, row by row.
template <typename Row, typename Out, int kParts, int kEntries>
__global__ void __launch_bounds__(kRowThreads) scale_kernel(
    const Row* __restrict__ x,     // [rows, D]
    const Compute<Row>* products,  // [rows, kParts, from_stride]
    Out* scaled,                   // [rows, to_stride]; may be products
    int64_t D, int64_t S, int64_t rows, int64_t from_stride, int64_t to_stride, bool wide_from,
    bool wide_to) {
  using T = Compute<Row>;
  constexpr int kTogether = kWideEntries<T>;
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const T r = static_cast<T>(inverse_norm<kEntries>(x + row * D, D));
  const T* from = products + row * kParts * from_stride;
  for (int64_t s = lane_of_warp() * kTogether; s < to_stride; s += kWarp * kTogether) {
    Wide<T> sum = load_entries(from, s, S, wide_from, T{0});
#pragma unroll
    for (int part = 1; part < kParts; ++part) {
      const auto more = load_entries(from + part * from_stride, s, S, wide_from, T{0});
#pragma unroll
      for (int i = 0; i < kTogether; ++i) sum.entry[i] += more.entry[i];
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) sum.entry[i] *= r;
    store_entries(scaled + row * to_stride, s, to_stride, wide_to, sum);
  }
}

template <int kParts, typename Row, typename Out>
void scale(
    const Row* x, const Compute<Row>* products, Out* scaled, int64_t D, int64_t S, int64_t rows,
    int64_t from_stride, int64_t to_stride, cudaStream_t stream) {
  launch(
      in_wide_pieces<Row>(D, x) ? scale_kernel<Row, Out, kParts, kWideEntries<Row>>
                                : scale_kernel<Row, Out, kParts, 1>,
      blocks_of_rows(rows), kRowThreads, 0, stream, x, products, scaled, D, S, rows, from_stride,
      to_stride, rows_are_wide(products, from_stride), rows_are_wide(scaled, to_stride));
}

template <typename Row, int kEntries>
__global__ void __launch_bounds__(kRowThreads) soft_logits_backward_kernel(
    const Row* __restrict__ x,  // [rows, D]
    Row* grad,                  // [rows, D]  in: U; out: gradient of x
    int64_t D, int64_t rows) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const Row* token = x + row * D;
  Row* out = grad + row * D;
  const double r = inverse_norm<kEntries>(token, D);
  const double along = r * (r * dot_of_warp<kEntries>(token, out, D));
  for (int64_t piece = lane_of_warp(); piece < D / kEntries; piece += kWarp) {
    const auto from = load_piece<kEntries>(token, piece);
    auto to = load_piece<kEntries>(out, piece);
#pragma unroll
    for (int d = 0; d < kEntries; ++d) {
      const auto entry = static_cast<double>(widen(from.entry[d]));
      const double rest = static_cast<double>(widen(to.entry[d])) - along * entry;
      to.entry[d] = narrow<Row>(static_cast<Compute<Row>>(rest));
    }
    store_piece<kEntries>(out, piece, to);
  }
}

}  // namespace

template <typename Row>
void soft_logits_parts(
    const Compute<Row>* phi, Row* parts, int64_t D, int64_t S, CUstream_st* stream) {
  launch(
      parts_kernel<Row>, blocks_of_rows(D), kRowThreads, 0, stream, phi, parts, D, S,
      rows_are_wide(phi, S));
}

template <typename Row>
void soft_logits(
    const Row* x, const Compute<Row>* products, Compute<Row>* logits, int64_t D, int64_t S,
    int64_t rows, CUstream_st* stream) {
  scale<kHalf<Row> ? 2 : 1>(
      x, products, logits, D, S, rows, kHalf<Row> ? row_stride<Row>(S) : S, S, stream);
}

template <typename Row>
void soft_logits_scaled(
    const Row* x, const Compute<Row>* grad, Row* scaled, int64_t D, int64_t S, int64_t rows,
    CUstream_st* stream) {
  scale<1>(x, grad, scaled, D, S, rows, S, row_stride<Row>(S), stream);
}

template <typename Row>
void soft_logits_backward(const Row* x, Row* grad, int64_t D, int64_t rows, CUstream_st* stream) {
  launch(
      in_wide_pieces<Row>(D, x, grad) ? soft_logits_backward_kernel<Row, kWideEntries<Row>>
                                      : soft_logits_backward_kernel<Row, 1>,
      blocks_of_rows(rows), kRowThreads, 0, stream, x, grad, D, rows);
}

template void soft_logits_parts(const float*, BFloat16*, int64_t, int64_t, CUstream_st*);
template void soft_logits_parts(const float*, Float16*, int64_t, int64_t, CUstream_st*);
#define VMOE_INSTANTIATE(Row)                                                                      \
  template void soft_logits(                                                                       \
      const Row*, const Compute<Row>*, Compute<Row>*, int64_t, int64_t, int64_t, CUstream_st*);    \
  template void soft_logits_scaled(                                                                \
      const Row*, const Compute<Row>*, Row*, int64_t, int64_t, int64_t, CUstream_st*);             \
  template void soft_logits_backward(const Row*, Row*, int64_t, int64_t, CUstream_st*);
VMOE_EACH_ROW(VMOE_INSTANTIATE)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
