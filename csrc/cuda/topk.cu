#include <cuda_runtime.h>

#include <cub/block/block_reduce.cuh>

#include "../order.h"
#include "../topk.h"

namespace vmoe::cuda {
namespace {

struct First {
  template <typename P>
  __device__ P operator()(const P& a, const P& b) const {
    return b.before(a) ? b : a;
  }
};

// A block a row. Round j finds the first pick that comes after pick j - 1, so
// nothing has to be marked as taken and any n and k fit.
template <typename T, int kThreads>
__global__ void __launch_bounds__(kThreads) topk_kernel(
    const T* __restrict__ x,        // [N, n, M]
    T* __restrict__ values,         // [N, M, k]
    int32_t* __restrict__ indices,  // [N, M, k]
    int64_t n, int64_t M, int64_t k, int64_t rows) {
  using P = Pick<OrderKey<T>>;
  using Reduce = cub::BlockReduce<P, kThreads>;
  __shared__ typename Reduce::TempStorage scratch;
  __shared__ P last;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const T* column = x + (row / M) * n * M + row % M;
    for (int64_t j = 0; j < k; ++j) {
      // Index n stands for "none yet": every real candidate comes before it.
      P best{0, static_cast<int32_t>(n)};
      for (int64_t i = threadIdx.x; i < n; i += kThreads) {
        const P pick{order_key(column[i * M]), static_cast<int32_t>(i)};
        if ((j == 0 || last.before(pick)) && pick.before(best)) best = pick;
      }
      best = Reduce(scratch).Reduce(best, First{});
      if (threadIdx.x == 0) {
        last = best;
        values[row * k + j] = column[best.index * M];
        indices[row * k + j] = best.index;
      }
      __syncthreads();
    }
  }
}

template <typename T, int kThreads>
void launch(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t M, int64_t k, int64_t rows,
    cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(rows < (1 << 20) ? rows : (1 << 20));
  topk_kernel<T, kThreads><<<blocks, kThreads, 0, stream>>>(x, values, indices, n, M, k, rows);
}

}  // namespace

template <typename T>
void topk(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t M, int64_t k, int64_t rows,
    CUstream_st* stream) {
  if (rows == 0 || k == 0) return;
  if (n <= 256) {
    launch<T, 32>(x, values, indices, n, M, k, rows, stream);
  } else {
    launch<T, 256>(x, values, indices, n, M, k, rows, stream);
  }
}

template void topk(
    const float*, float*, int32_t*, int64_t, int64_t, int64_t, int64_t, CUstream_st*);
template void topk(
    const double*, double*, int32_t*, int64_t, int64_t, int64_t, int64_t, CUstream_st*);

}  // namespace vmoe::cuda
