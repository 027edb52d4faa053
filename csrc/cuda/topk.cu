// There are four methods. n, M and k determine the method:
//
//   few_of_rows     k <= 16, n <= 1024, M = 1 (experts of a token): kLanes lanes per row hold its
//                   keys in registers.
//   few_of_columns  k <= 16, n <= 1024, M > 1 (tokens of an expert): a block copies a tile of
//                   columns to shared memory, and selects with one warp per column.
//   many            k <= 4096: one block per row (BlockSelect), with the keys in shared memory if
//                   they fit. If M > 1, x is transposed first, because reading a column in place
//                   would use few bytes of every memory sector.
//   sort            k > 4096, more picks than a block sorts: CUB sorts whole rows (sort.h).
#include <algorithm>

#include "../topk.h"
#include "select.h"
#include "sort.h"
#include "transpose.h"

namespace vmoe::cuda {
namespace {

constexpr int kFewThreads = 256;

// Loads the keys of a row of n entries at `from`. Positions after the end of the row get key 0.
template <typename T, int kLanes, int kEach, int kTogether, bool kWide>
__device__ void load_keys(
    Few<OrderKey<T>, kLanes, kEach, kTogether>& few, const T* __restrict__ from, int64_t n) {
#pragma unroll
  for (int i = 0; i < kEach; i += kTogether) {
    const int32_t index = few.index(i);
    if constexpr (kWide) {  // n is a multiple of kTogether
      Wide<T> wide = {};
      if (index < n) wide = *reinterpret_cast<const Wide<T>*>(from + index);
#pragma unroll
      for (int j = 0; j < kTogether; ++j)
        few.keys[i + j] = index < n ? order_key(wide.entry[j]) : 0;
    } else {
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        few.keys[i + j] = index + j < n ? order_key(from[index + j]) : 0;
      }
    }
  }
}

// Selects k entries of the row at `from`. `few` has the keys of the row. Writes the selected
// entries if `writes`.
template <typename T, int kLanes, int kEach, int kTogether>
__device__ void select_entries(
    Few<OrderKey<T>, kLanes, kEach, kTogether>& few, const T* from,
    T* __restrict__ values,         // [k]
    int32_t* __restrict__ indices,  // [k]
    int64_t k, bool writes) {
  few.select(static_cast<int>(k), [&](int j, const auto& pick) {
    if (!writes || few.lane() > 0) return;
    // The value is read again, because the key has lost the sign of zero and the payload of a NaN.
    values[j] = from[pick.index];
    indices[j] = pick.index;
  });
}

template <typename T, int kLanes, int kEach, bool kWide>
__global__ void __launch_bounds__(kFewThreads) few_of_rows_kernel(
    const T* __restrict__ x,        // [rows, n]
    T* __restrict__ values,         // [rows, k]
    int32_t* __restrict__ indices,  // [rows, k]
    int64_t n, int64_t k, int64_t rows) {
  const int64_t row = (int64_t{blockIdx.x} * kFewThreads + threadIdx.x) / kLanes;
  // Lanes without a row read the last row: all lanes of a warp must take part in its shuffles.
  const T* from = x + (row < rows ? row : rows - 1) * n;
  Few<OrderKey<T>, kLanes, kEach, kWideEntries<T>> few;
  load_keys<T, kLanes, kEach, kWideEntries<T>, kWide>(few, from, n);
  select_entries(few, from, values + row * k, indices + row * k, k, row < rows);
}

template <typename T, int kEach>
__global__ void __launch_bounds__(kFewThreads) few_of_columns_kernel(
    const T* __restrict__ x,        // [N, n, M]
    T* __restrict__ values,         // [N, M, k]
    int32_t* __restrict__ indices,  // [N, M, k]
    int64_t n, int64_t M, int64_t k) {
  T* tile = dynamic_shared<T>();  // [width, n | 1]; an odd stride avoids bank conflicts
  const int64_t tiles = ceil_div(M, kWarp), stride = n | 1;
  const int64_t a = blockIdx.x / tiles, m = blockIdx.x % tiles * kWarp;
  const int64_t width = M - m < kWarp ? M - m : kWarp;
  const int column = static_cast<int>(threadIdx.x) % kWarp;
  for (int64_t i = threadIdx.x / kWarp; column < width && i < n; i += kFewThreads / kWarp) {
    tile[column * stride + i] = x[(a * n + i) * M + m + column];
  }
  __syncthreads();
  for (int64_t c = threadIdx.x / kWarp; c < width; c += kFewThreads / kWarp) {
    const T* from = tile + c * stride;
    const int64_t row = a * M + m + c;
    Few<OrderKey<T>, kWarp, kEach, 1> few;
    load_keys<T, kWarp, kEach, 1, false>(few, from, n);
    select_entries(few, from, values + row * k, indices + row * k, k, true);
  }
}

// The most picks that a block sorts.
constexpr int64_t kMany = 4096;

template <typename T, int kThreads, bool kStaged>
__global__ void __launch_bounds__(kThreads) many_kernel(
    const T* __restrict__ x,        // [rows, n]
    T* __restrict__ values,         // [rows, k]
    int32_t* __restrict__ indices,  // [rows, k]
    int64_t n, int64_t k, int places /* k, rounded up to a power of two */) {
  using Key = OrderKey<T>;
  using Select = BlockSelect<Key, kThreads>;
  __shared__ typename Select::Storage storage;
  static_assert(sizeof(storage) <= kDeclaredShared);
  auto* picks = dynamic_shared<Pick<Key>>();           // [places]
  Key* keys = reinterpret_cast<Key*>(picks + places);  // [n] if kStaged
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  const T* from = x + row * n;
  Select::select(
      storage, picks, places, keys, kStaged, n, k, [&](int64_t i) { return order_key(from[i]); },
      [](int64_t i) { return static_cast<int32_t>(i); });
  for (int64_t j = tid; j < k; j += kThreads) {
    values[row * k + j] = from[picks[j].index];
    indices[row * k + j] = picks[j].index;
  }
}

template <typename T>
__global__ void __launch_bounds__(256) first_kernel(
    const T* __restrict__ x,             // [rows, n]
    const int32_t* __restrict__ sorted,  // [rows, n]
    T* __restrict__ values,              // [rows, k]
    int32_t* __restrict__ indices,       // [rows, k]
    int64_t n, int64_t k, int64_t rows) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < rows * k;
       i += int64_t{gridDim.x} * blockDim.x) {
    const int64_t row = i / k;
    const int32_t index = sorted[row * n + i % k];
    values[i] = x[row * n + index];
    indices[i] = index;
  }
}

template <typename T, int kLanes, int kEach>
void few_of_rows(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t k, int64_t rows,
    cudaStream_t stream) {
  const bool wide = n % kWideEntries<T> == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  launch(
      wide ? few_of_rows_kernel<T, kLanes, kEach, true>
           : few_of_rows_kernel<T, kLanes, kEach, false>,
      ceil_div(rows * kLanes, kFewThreads), kFewThreads, 0, stream, x, values, indices, n, k, rows);
}

template <typename T>
size_t many_shared(int64_t n, int64_t places, bool staged) {
  using Key = OrderKey<T>;
  return static_cast<size_t>(places) * sizeof(Pick<Key>) + (staged ? n * sizeof(Key) : 0);
}

template <typename T, int kThreads>
void many(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t k, int64_t rows,
    cudaStream_t stream) {
  int places = 1;
  while (places < k) places *= 2;
  const bool staged = static_cast<int64_t>(many_shared<T>(n, places, true)) <= shared_limit();
  launch(
      staged ? many_kernel<T, kThreads, true> : many_kernel<T, kThreads, false>, rows, kThreads,
      many_shared<T>(n, places, staged), stream, x, values, indices, n, k, places);
}

// The kernel and the workspace for a shape. topk_workspace and topk both use this struct, so that
// they agree on the size of the workspace.
template <typename T>
struct Layout {
  enum class Kernel { kNone, kFewOfRows, kFewOfColumns, kMany, kSort };

  Layout(int64_t n, int64_t M, int64_t k, int64_t rows, void* memory) {
    constexpr int64_t kLongest = 1024;
    if (rows == 0 || k == 0) return;
    const bool is_few = k <= kFew && n <= kLongest;
    tile = std::min<int64_t>(M, kWarp) * (n | 1) * static_cast<int64_t>(sizeof(T));
    if (is_few && M == 1) {
      kernel = Kernel::kFewOfRows;
    } else if (is_few && tile <= shared_limit()) {
      kernel = Kernel::kFewOfColumns;
    } else {
      kernel = k > kMany ? Kernel::kSort : Kernel::kMany;
      Workspace workspace(memory);
      if (M > 1) transposed = workspace.take<T>(rows * n);
      if (k > kMany) sort = SortLayout<OrderKey<T>>(rows, n, workspace);
      bytes = workspace.size();
    }
  }

  Kernel kernel = Kernel::kNone;
  int64_t tile = 0;         // bytes of shared memory of few_of_columns
  T* transposed = nullptr;  // [rows, n]
  SortLayout<OrderKey<T>> sort;
  size_t bytes = 0;
};

template <typename T>
void few_of_rows(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t k, int64_t rows,
    cudaStream_t stream) {
  const auto with = [&](auto kernel) { kernel(x, values, indices, n, k, rows, stream); };
  if (n <= 16) {
    with(few_of_rows<T, 4, 4>);
  } else if (n <= 32) {
    with(few_of_rows<T, 8, 4>);
  } else if (n <= 64) {
    with(few_of_rows<T, 16, 4>);
  } else if (n <= 128) {
    with(few_of_rows<T, kWarp, 4>);
  } else if (n <= 512) {
    with(few_of_rows<T, kWarp, 16>);
  } else {
    with(few_of_rows<T, kWarp, 32>);
  }
}

}  // namespace

template <typename T>
size_t topk_workspace(int64_t n, int64_t M, int64_t k, int64_t rows) {
  return Layout<T>(n, M, k, rows, nullptr).bytes;
}

template <typename T>
void topk(
    const T* x, T* values, int32_t* indices, int64_t n, int64_t M, int64_t k, int64_t rows,
    void* workspace, CUstream_st* stream) {
  using Kernel = typename Layout<T>::Kernel;
  const Layout<T> layout(n, M, k, rows, workspace);
  if (layout.transposed) {
    transpose(x, layout.transposed, rows / M, n, M, stream);
    x = layout.transposed;
  }
  switch (layout.kernel) {
    case Kernel::kNone:
      return;
    case Kernel::kFewOfRows:
      return few_of_rows(x, values, indices, n, k, rows, stream);
    case Kernel::kFewOfColumns:
      return launch(
          n <= 256 ? few_of_columns_kernel<T, 8> : few_of_columns_kernel<T, 32>,
          rows / M * ceil_div(M, kWarp), kFewThreads, static_cast<size_t>(layout.tile), stream, x,
          values, indices, n, M, k);
    case Kernel::kMany:
      return (n <= 2048 ? many<T, 256> : many<T, 1024>)(x, values, indices, n, k, rows, stream);
    case Kernel::kSort:
      sort_rows(x, layout.sort, stream);
      return launch(
          first_kernel<T>, std::min<int64_t>(ceil_div(rows * k, 256), 1 << 20), 256, 0, stream, x,
          layout.sort.sorted, values, indices, n, k, rows);
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template size_t topk_workspace<T>(int64_t, int64_t, int64_t, int64_t);                           \
  template void topk(                                                                              \
      const T*, T*, int32_t*, int64_t, int64_t, int64_t, int64_t, void*, CUstream_st*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cuda
