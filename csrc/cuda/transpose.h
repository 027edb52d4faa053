// transpose -- a matrix transpose, for kernels that read whole columns.
#pragma once

#include "launch.h"

namespace vmoe::cuda {
namespace {

constexpr int kTile = 32;

// Transposes [N, n, M] to [N, M, n]. Each block of 32 x 8 threads moves a tile of 32 x 32.
template <typename T>
__global__ void __launch_bounds__(256) transpose_kernel(
    const T* __restrict__ x,  // [N, n, M]
    T* __restrict__ y,        // [N, M, n]
    int64_t n, int64_t M) {
  __shared__ T tile[kTile][kTile + 1];
  const int64_t down = ceil_div(n, kTile), across = ceil_div(M, kTile);
  const int64_t a = blockIdx.x / (down * across);
  const int64_t i = blockIdx.x / across % down * kTile, m = blockIdx.x % across * kTile;
  const int column = static_cast<int>(threadIdx.x) % kTile;
  for (int row = static_cast<int>(threadIdx.x) / kTile; row < kTile; row += 8) {
    if (i + row < n && m + column < M) {
      tile[row][column] = x[(a * n + i + row) * M + m + column];
    }
  }
  __syncthreads();
  for (int row = static_cast<int>(threadIdx.x) / kTile; row < kTile; row += 8) {
    if (m + row < M && i + column < n) {
      y[(a * M + m + row) * n + i + column] = tile[column][row];
    }
  }
}

template <typename T>
void transpose(
    const T* x,  // [N, n, M]
    T* y,        // [N, M, n]
    int64_t N, int64_t n, int64_t M, cudaStream_t stream) {
  launch(
      transpose_kernel<T>, N * ceil_div(n, kTile) * ceil_div(M, kTile), 256, 0, stream, x, y, n, M);
}

}  // namespace
}  // namespace vmoe::cuda
