#include "../combine.h"
#include "../common/slots.h"
#include "rows.h"
#include "scalar.h"

namespace vmoe::cuda {
namespace {

constexpr int kPieces = 3;  // pieces of a row that a lane loads before it uses the first

// One warp per token sums its slots in registers, one slot after another. The order is the order of
// the CPU kernel.
template <typename Row, int kEntries>
__global__ void __launch_bounds__(kRowThreads, 4) combine_kernel(
    const Row* __restrict__ y,              // [E, G, C, D]
    const Compute<Row>* __restrict__ gate,  // [G, E, C] or null
    const int32_t* __restrict__ offsets,    // [G, T + 1]
    const int32_t* __restrict__ slots,      // [G, E * C]
    Row* __restrict__ out,                  // [G, T, D]
    Slots shape, int64_t D) {
  using T = Compute<Row>;
  const int64_t row = row_of_warp(), tokens = shape.tokens, S = shape.of_group();
  if (row >= shape.all_tokens()) return;
  const int64_t g = row / tokens, t = row % tokens;
  const int32_t* start = offsets + g * (tokens + 1) + t;
  const int64_t begin = start[0] > 0 ? start[0] : 0, end = start[1] < S ? start[1] : S;
  const int64_t pieces = D / kEntries;
  for (int64_t first = lane_of_warp(); first < pieces; first += kPieces * kWarp) {
    T total[kPieces][kEntries] = {};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t s = slots[g * S + i];
      if (s < 0 || s >= S) continue;
      const T weight = gate ? gate[g * S + s] : T{1};
      const Row* from = y + shape.row(g, s) * D;
      Piece<Row, kEntries> of_slot[kPieces] = {};
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int64_t piece = first + p * kWarp;
        if (piece < pieces) of_slot[p] = load_piece<kEntries>(from, piece);
      }
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
#pragma unroll
        for (int d = 0; d < kEntries; ++d) {
          total[p][d] = Fused{}(weight, widen(of_slot[p].entry[d]), total[p][d]);
        }
      }
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t piece = first + p * kWarp;
      if (piece >= pieces) break;
      Piece<Row, kEntries> sum;
#pragma unroll
      for (int d = 0; d < kEntries; ++d) sum.entry[d] = narrow<Row>(total[p][d]);
      store_piece<kEntries>(out + row * D, piece, sum);
    }
  }
}

// One warp per slot.
template <typename Row, int kEntries>
__global__ void __launch_bounds__(kRowThreads) combine_backward_kernel(
    const Row* __restrict__ grad_out,       // [G, T, D]
    const Row* __restrict__ y,              // [E, G, C, D]
    const Compute<Row>* __restrict__ gate,  // [G, E, C]
    const int32_t* __restrict__ token,      // [G, E, C]
    Row* __restrict__ grad_y,               // [E, G, C, D]
    Compute<Row>* __restrict__ grad_gate,   // [G, E, C]
    Slots shape, int64_t D) {
  using T = Compute<Row>;
  const int64_t row = row_of_warp();
  if (row >= shape.all()) return;
  const SlotRow at = shape.at(row);
  const int32_t t = token[at.slot];
  const bool filled = t >= 0 && t < shape.tokens;
  const T weight = filled ? gate[at.slot] : T{0};
  const Row* from = grad_out + (at.group * shape.tokens + (filled ? t : 0)) * D;
  T dot = 0;
  const int64_t pieces = D / kEntries;
  for (int64_t first = lane_of_warp(); first < pieces; first += kPieces * kWarp) {
    Piece<Row, kEntries> grads[kPieces] = {}, values[kPieces] = {};
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t piece = first + p * kWarp;
      if (!filled || piece >= pieces) continue;  // an empty slot of y may hold NaN: do not read it
      grads[p] = load_piece<kEntries>(from, piece);
      values[p] = load_piece<kEntries>(y + row * D, piece);
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int64_t piece = first + p * kWarp;
      if (piece >= pieces) break;
      Piece<Row, kEntries> to;
#pragma unroll
      for (int d = 0; d < kEntries; ++d) {
        to.entry[d] = narrow<Row>(weight * widen(grads[p].entry[d]));
        dot = Fused{}(widen(grads[p].entry[d]), widen(values[p].entry[d]), dot);
      }
      store_piece<kEntries>(grad_y + row * D, piece, to);
    }
  }
  for (int turn = kWarp / 2; turn > 0; turn /= 2) dot += __shfl_xor_sync(kAllLanes, dot, turn);
  if (lane_of_warp() == 0) grad_gate[at.slot] = dot;
}

}  // namespace

template <typename Row>
void combine(
    const Row* y, const Compute<Row>* gate, const int32_t* offsets, const int32_t* slots, Row* out,
    const Slots& shape, int64_t D, CUstream_st* stream) {
  launch(
      in_wide_pieces<Row>(D, y, out) ? combine_kernel<Row, kWideEntries<Row>>
                                     : combine_kernel<Row, 1>,
      blocks_of_rows(shape.all_tokens()), kRowThreads, 0, stream, y, gate, offsets, slots, out,
      shape, D);
}

template <typename Row>
void combine_backward(
    const Row* grad_out, const Row* y, const Compute<Row>* gate, const int32_t* token, Row* grad_y,
    Compute<Row>* grad_gate, const Slots& shape, int64_t D, CUstream_st* stream) {
  launch(
      in_wide_pieces<Row>(D, grad_out, y, grad_y) ? combine_backward_kernel<Row, kWideEntries<Row>>
                                                  : combine_backward_kernel<Row, 1>,
      blocks_of_rows(shape.all()), kRowThreads, 0, stream, grad_out, y, gate, token, grad_y,
      grad_gate, shape, D);
}

#define VMOE_INSTANTIATE(Row)                                                                      \
  template void combine(                                                                           \
      const Row*, const Compute<Row>*, const int32_t*, const int32_t*, Row*, const Slots&,         \
      int64_t, CUstream_st*);                                                                      \
  template void combine_backward(                                                                  \
      const Row*, const Row*, const Compute<Row>*, const int32_t*, Row*, Compute<Row>*,            \
      const Slots&, int64_t, CUstream_st*);
VMOE_EACH_ROW(VMOE_INSTANTIATE)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
