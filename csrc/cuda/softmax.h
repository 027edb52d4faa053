// softmax -- what every softmax here has in common, and the one along rows.
//
// What a row's softmax is must not depend on the kernel that asks for it: gates that a choice was
// made by are the gates that weigh (softmax_gather.h). So the order of a row's sum is set by the
// row's length alone, here.
#pragma once

#include <limits>

#include "../common/exp.h"
#include "rows.h"
#include "scalar.h"
#include "select.h"

namespace vmoe::cuda {

// The number whose exponent is in the last bits of v.
struct LastBits {
  VMOE_HOST_DEVICE float operator()(float v) const {
    uint32_t bits;
    memcpy(&bits, &v, sizeof(bits));
    bits <<= ExpOf<float>::mantissa;
    memcpy(&v, &bits, sizeof(v));
    return v;
  }
  VMOE_HOST_DEVICE double operator()(double v) const {
    uint64_t bits;
    memcpy(&bits, &v, sizeof(bits));
    bits <<= ExpOf<double>::mantissa;
    memcpy(&v, &bits, sizeof(v));
    return v;
  }
};

template <typename T>
__device__ T exp_negative(T x) {
  return vmoe::exp_negative<T>(x, Fused{}, LastBits{});
}

// "Not there".
template <typename T>
constexpr T kAbsent = -std::numeric_limits<T>::infinity();

// A maximum that passes over NaN: the sum does not, and makes the row NaN.
template <typename T>
__device__ T larger(T value, T than) {
  return value > than ? value : than;
}

// Of what a row's largest entry says of the others, what is taken from them. Where there is nothing
// but -inf 0, so that the exponentials are 0 and not NaN.
template <typename T>
__device__ T softmax_shift(T high) {
  return high == kAbsent<T> ? T{0} : high;
}

// What the exponentials are multiplied by. Their sum is 0, where nothing is there, or at least 1.
template <typename T>
__device__ T softmax_scale(T total) {
  return total == 0 ? T{0} : T{1} / total;
}

template <int kLanes, typename T>
__device__ T max_of_lanes(T value) {
  for (int turn = kLanes / 2; turn > 0; turn /= 2) {
    value = larger(__shfl_xor_sync(kAllLanes, value, turn), value);
  }
  return value;
}

// In one order for all lanes: a butterfly adds the same pairs everywhere.
template <int kLanes, typename T>
__device__ T sum_of_lanes(T value) {
  for (int turn = kLanes / 2; turn > 0; turn /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, turn);
  }
  return value;
}

// A row of up to kLanes * kEach entries in the registers of kLanes lanes; all lanes of the warp work
// together. Entries behind the row's end are -inf, and add nothing.
template <typename T, int kLanes, int kEach>
struct RowSoftmax {
  static constexpr int kTogether = kWideEntries<T>;
  using Picks = Few<OrderKey<T>, kLanes, kEach, kTogether>;

  T powers[kEach];  // the exponentials
  T high, scale;    // norms of softmax_gather.h

  // wide: the row can be read in pieces of 16 bytes.
  __device__ void read(const T* __restrict__ row, int64_t n, bool wide) {
    high = kAbsent<T>;
#pragma unroll
    for (int i = 0; i < kEach; i += kTogether) {
      const Wide<T> piece = load_entries(row, Picks::index(i), n, wide, kAbsent<T>);
#pragma unroll
      for (int j = 0; j < kTogether; ++j) powers[i + j] = piece.entry[j];
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) high = larger(powers[i], high);
    high = softmax_shift(max_of_lanes<kLanes>(high));
    T total = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      powers[i] = exp_negative(powers[i] - high);
      total += powers[i];
    }
    scale = softmax_scale(sum_of_lanes<kLanes>(total));
  }

  __device__ bool absent() const { return scale == 0; }
  __device__ T gate(int i) const { return powers[i] * scale; }
};

// The longest row that a RowSoftmax takes; longer ones are a block's.
constexpr int64_t kLongestRow = 1024;

template <int kLanesOf, int kEachOf>
struct RowShape {
  static constexpr int kLanes = kLanesOf, kEach = kEachOf;
};

// body(RowShape) with the one shape for rows of n <= kLongestRow entries.
template <typename Body>
void by_row_length(int64_t n, Body&& body) {
  if (n <= 16) {
    body(RowShape<4, 4>{});
  } else if (n <= 32) {
    body(RowShape<8, 4>{});
  } else if (n <= 64) {
    body(RowShape<16, 4>{});
  } else if (n <= 128) {
    body(RowShape<kWarp, 4>{});
  } else if (n <= 256) {
    body(RowShape<kWarp, 8>{});
  } else if (n <= 512) {
    body(RowShape<kWarp, 16>{});
  } else {
    body(RowShape<kWarp, 32>{});
  }
}

constexpr int kSoftmaxThreads = 256;

template <typename T>
struct Norms {
  T high, scale;
};

namespace {

// Over the block's kSoftmaxThreads, who call this together; in one order, and all of them get it.
template <typename T>
__device__ T sum_of_block(T value) {
  constexpr int kWarps = kSoftmaxThreads / kWarp;
  __shared__ T of_warps[kWarps];
  value = sum_of_lanes<kWarp>(value);
  __syncthreads();  // of an earlier call
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kWarps; ++warp) value += of_warps[warp];
  return value;
}

// Of one row of any length; all kSoftmaxThreads of the block call this together and get them.
template <typename T>
__device__ Norms<T> norms_of_block(const T* __restrict__ row, int64_t n) {
  constexpr int kWarps = kSoftmaxThreads / kWarp;
  __shared__ T of_warps[kWarps];
  const int tid = static_cast<int>(threadIdx.x);
  T high = kAbsent<T>;
  for (int64_t i = tid; i < n; i += kSoftmaxThreads) high = larger(row[i], high);
  high = max_of_lanes<kWarp>(high);
  if (tid % kWarp == 0) of_warps[tid / kWarp] = high;
  __syncthreads();
  for (int warp = 0; warp < kWarps; ++warp) high = larger(of_warps[warp], high);
  high = softmax_shift(high);
  T total = 0;
  for (int64_t i = tid; i < n; i += kSoftmaxThreads) total += exp_negative(row[i] - high);
  return {high, softmax_scale(sum_of_block(total))};
}

template <typename T, int kLanes, int kEach>
__global__ void __launch_bounds__(kSoftmaxThreads) norms_kernel(
    const T* __restrict__ logits,  // [rows, n]
    T* __restrict__ high,          // [rows]
    T* __restrict__ scale,         // [rows]
    int64_t n, int64_t rows, bool wide) {
  const int64_t row = (int64_t{blockIdx.x} * kSoftmaxThreads + threadIdx.x) / kLanes;
  RowSoftmax<T, kLanes, kEach> softmax;
  // Lanes without a row of their own repeat the last: the warp stays together.
  softmax.read(logits + (row < rows ? row : rows - 1) * n, n, wide);
  if (row < rows && threadIdx.x % kLanes == 0) {
    high[row] = softmax.high;
    scale[row] = softmax.scale;
  }
}

template <typename T>
__global__ void __launch_bounds__(kSoftmaxThreads) long_norms_kernel(
    const T* __restrict__ logits,  // [rows, n]
    T* __restrict__ high,          // [rows]
    T* __restrict__ scale,         // [rows]
    int64_t n) {
  const int64_t row = blockIdx.x;
  const Norms<T> norms = norms_of_block(logits + row * n, n);
  if (threadIdx.x == 0) {
    high[row] = norms.high;
    scale[row] = norms.scale;
  }
}

template <typename T>
void softmax_norms(
    const T* logits, T* high, T* scale, int64_t n, int64_t rows, cudaStream_t stream) {
  if (n > kLongestRow) {
    return launch(long_norms_kernel<T>, rows, kSoftmaxThreads, 0, stream, logits, high, scale, n);
  }
  by_row_length(n, [&](auto shape) {
    using Shape = decltype(shape);
    launch(
        norms_kernel<T, Shape::kLanes, Shape::kEach>,
        ceil_div(rows * Shape::kLanes, kSoftmaxThreads), kSoftmaxThreads, 0, stream, logits, high,
        scale, n, rows, rows_are_wide(logits, n));
  });
}

}  // namespace
}  // namespace vmoe::cuda
