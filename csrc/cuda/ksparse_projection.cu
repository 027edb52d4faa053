#include "../ksparse_projection.h"
#include "simplex.h"

namespace vmoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kShort = 1024;  // up to this length a row takes at most a warp, else a block

template <typename T, typename Team>
__device__ void project_row(
    const Team& team,
    const T* x,  // [n], in shared or device memory
    T* out,      // [n]
    int64_t n, int64_t k) {
  const auto value_at = [=](int64_t i) { return x[i]; };
  const auto projection = project<T>(
      team, Entries<Team, decltype(value_at)>{team, n, value_at}, n, k, 1,
      Guess<T>{static_cast<T>(kUndefined), 0});
  const bool undefined = projection.tau != projection.tau;
  for (int64_t i = team.rank(); i < n; i += team.size()) {
    out[i] = undefined ? static_cast<T>(kUndefined) : static_cast<T>(projection.share(x[i], i, 1));
  }
}

template <typename T, int kLanes>
__global__ void __launch_bounds__(kThreads) short_rows_kernel(
    const T* __restrict__ x,  // [N, n]
    T* __restrict__ out,      // [N, n]
    int64_t n, int64_t k, int64_t rows) {
  const int64_t of_block = threadIdx.x / kLanes;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kLanes) + of_block;
  if (row >= rows) return;
  const LaneTeam<kLanes> team{};
  T* entries = dynamic_shared<T>() + of_block * n;
  for (int64_t i = team.rank(); i < n; i += kLanes) entries[i] = x[row * n + i];
  __syncwarp(team.mask());
  project_row(team, entries, out + row * n, n, k);
}

template <typename T, bool kStaged>
__global__ void __launch_bounds__(kThreads) long_rows_kernel(
    const T* __restrict__ x,  // [N, n]
    T* __restrict__ out,      // [N, n]
    int64_t n, int64_t k) {
  __shared__ BlockTeam::Storage storage;
  const BlockTeam team(storage);
  const T* entries = x + blockIdx.x * n;
  if constexpr (kStaged) {
    T* staged = dynamic_shared<T>();
    for (int64_t i = team.rank(); i < n; i += kThreads) staged[i] = entries[i];
    __syncthreads();
    entries = staged;
  }
  project_row(team, entries, out + blockIdx.x * n, n, k);
}

// The projections are along the middle axis of [A, n, B]. A block computes kColumns adjacent
// projections, with kThreads / kColumns threads for each. Sums have a fixed order.
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const T* __restrict__ grad,  // [A, n, B]
    const T* __restrict__ out,   // [A, n, B]
    T* __restrict__ grad_x,      // [A, n, B]
    int64_t n, int64_t B, int64_t blocks_across) {
  constexpr int kRows = kThreads / kColumns;
  __shared__ T totals[kRows][kColumns], counts[kRows][kColumns];
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int row = static_cast<int>(threadIdx.x) / kColumns;
  const int64_t a = blockIdx.x / blocks_across;
  const int64_t b = blockIdx.x % blocks_across * kColumns + column;
  const int64_t end = b < B ? n : 0, first = a * n * B + b;
  T total = 0, count = 0;
  for (int64_t i = row; i < end; i += kRows) {
    if (out[first + i * B] == 0) continue;
    total += grad[first + i * B];
    count += 1;
  }
  totals[row][column] = total;
  counts[row][column] = count;
  for (int half = kRows / 2; half > 0; half /= 2) {
    __syncthreads();
    if (row >= half) continue;
    totals[row][column] += totals[row + half][column];
    counts[row][column] += counts[row + half][column];
  }
  __syncthreads();
  const T support = counts[0][column];
  const T mean = support > 0 ? totals[0][column] / support : T{0};
  for (int64_t i = row; i < end; i += kRows) {
    const int64_t at = first + i * B;
    grad_x[at] = out[at] == 0 ? T{0} : grad[at] - mean;
  }
}

}  // namespace

template <typename T>
void ksparse_projection(
    const T* x, T* out, int64_t n, int64_t k, int64_t rows, CUstream_st* stream) {
  if (n == 0) return;
  const auto size = static_cast<size_t>(n) * sizeof(T);
  if (k <= 0) {
    cudaMemsetAsync(out, 0, static_cast<size_t>(rows) * size, stream);
  } else if (n <= kShort) {
    const int64_t lanes = n <= 16 ? 8 : kWarp, rows_of_block = kThreads / lanes;
    launch(
        lanes == 8 ? short_rows_kernel<T, 8> : short_rows_kernel<T, kWarp>,
        ceil_div(rows, rows_of_block), kThreads, rows_of_block * size, stream, x, out, n, k, rows);
  } else {
    const bool staged = static_cast<int64_t>(size) <= shared_limit();
    launch(
        staged ? long_rows_kernel<T, true> : long_rows_kernel<T, false>, rows, kThreads,
        staged ? size : 0, stream, x, out, n, k);
  }
}

template <typename T>
void ksparse_projection_backward(
    const T* grad, const T* out, T* grad_x, int64_t A, int64_t n, int64_t B, CUstream_st* stream) {
  const int columns = B == 1 ? 1 : kWarp;
  const int64_t blocks_across = ceil_div(B, columns);
  launch(
      B == 1 ? backward_kernel<T, 1> : backward_kernel<T, kWarp>, A * blocks_across, kThreads, 0,
      stream, grad, out, grad_x, n, B, blocks_across);
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void ksparse_projection(const T*, T*, int64_t, int64_t, int64_t, CUstream_st*);         \
  template void ksparse_projection_backward(                                                       \
      const T*, const T*, T*, int64_t, int64_t, int64_t, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
