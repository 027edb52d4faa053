// A warp a token, before or behind a product of torch's.
#include "../soft_logits.h"
#include "rows.h"

namespace vmoe::cuda {
namespace {

// <a, b> of rows, all lanes get it; in float64 as on the CPU.
template <int kEntries, typename T>
__device__ double dot_of_warp(const T* a, const T* b, int64_t D) {
  double total = 0;
#pragma unroll 4
  for (int64_t piece = lane_of_warp(); piece < D / kEntries; piece += kWarp) {
    const auto from_a = load_piece<kEntries>(a, piece), from_b = load_piece<kEntries>(b, piece);
#pragma unroll
    for (int d = 0; d < kEntries; ++d) {
      const auto one = static_cast<double>(from_a.entry[d]);
      total = fma(one, static_cast<double>(from_b.entry[d]), total);
    }
  }
  for (int turn = kWarp / 2; turn > 0; turn /= 2) total += __shfl_xor_sync(kAllLanes, total, turn);
  return total;
}

template <int kEntries, typename T>
__device__ double inverse_norm(const T* x, int64_t D) {
  return 1 / sqrt(dot_of_warp<kEntries>(x, x, D) + 1e-6);
}

template <typename T, int kEntries>
__global__ void __launch_bounds__(kRowThreads) soft_logits_kernel(
    const T* __restrict__ x,  // [rows, D]
    const T* products,        // [rows, S]
    T* scaled,                // [rows, S]  may be products
    int64_t D, int64_t S, int64_t rows) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const T r = static_cast<T>(inverse_norm<kEntries>(x + row * D, D));
  for (int64_t s = lane_of_warp(); s < S; s += kWarp) {
    scaled[row * S + s] = r * products[row * S + s];
  }
}

template <typename T, int kEntries>
__global__ void __launch_bounds__(kRowThreads) soft_logits_backward_kernel(
    const T* __restrict__ x,  // [rows, D]
    T* grad,                  // [rows, D]  in: U; out: of x
    int64_t D, int64_t rows) {
  const int64_t row = row_of_warp();
  if (row >= rows) return;
  const T* token = x + row * D;
  T* out = grad + row * D;
  const double r = inverse_norm<kEntries>(token, D);
  const double along = r * (r * dot_of_warp<kEntries>(token, out, D));
  for (int64_t piece = lane_of_warp(); piece < D / kEntries; piece += kWarp) {
    const auto from = load_piece<kEntries>(token, piece);
    auto to = load_piece<kEntries>(out, piece);
#pragma unroll
    for (int d = 0; d < kEntries; ++d) {
      const auto entry = static_cast<double>(from.entry[d]);
      to.entry[d] = static_cast<T>(static_cast<double>(to.entry[d]) - along * entry);
    }
    store_piece<kEntries>(out, piece, to);
  }
}

}  // namespace

template <typename T>
void soft_logits(
    const T* x, const T* products, T* scaled, int64_t D, int64_t S, int64_t rows,
    CUstream_st* stream) {
  launch(
      in_wide_pieces<T>(D, x) ? soft_logits_kernel<T, kWideEntries<T>> : soft_logits_kernel<T, 1>,
      blocks_of_rows(rows), kRowThreads, 0, stream, x, products, scaled, D, S, rows);
}

template <typename T>
void soft_logits_backward(const T* x, T* grad, int64_t D, int64_t rows, CUstream_st* stream) {
  launch(
      in_wide_pieces<T>(D, x, grad) ? soft_logits_backward_kernel<T, kWideEntries<T>>
                                    : soft_logits_backward_kernel<T, 1>,
      blocks_of_rows(rows), kRowThreads, 0, stream, x, grad, D, rows);
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void soft_logits(const T*, const T*, T*, int64_t, int64_t, int64_t, CUstream_st*);      \
  template void soft_logits_backward(const T*, T*, int64_t, int64_t, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
