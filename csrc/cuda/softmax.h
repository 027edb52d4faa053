// softmax -- the softmax of rows, and helpers of all CUDA softmaxes.
//
// Every kernel computes the same bits for the same row, because softmax_topk must choose by the
// gates that softmax_gather returns (softmax_gather.h). The order in which a row is summed
// therefore depends on nothing but the length of the row.
#pragma once

#include <limits>

#include "../common/exp.h"
#include "rows.h"
#include "scalar.h"
#include "select.h"

namespace vmoe::cuda {

// Turns the integer in the last bits of v into the exponent of a number (exp.h).
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

// A logit of -inf is masked. A gate of -inf marks a masked token.
template <typename T>
constexpr T kAbsent = -std::numeric_limits<T>::infinity();

// The larger of two values, or `than` if `value` is NaN. A row with a NaN still becomes NaN,
// because the sum of its exponentials is NaN.
template <typename T>
__device__ T larger(T value, T than) {
  return value > than ? value : than;
}

// `larger` in one instruction. Of two zeros of different sign, either may be the result.
__device__ inline float larger_short(float value, float than) {
#ifdef __CUDACC__
  return fmaxf(value, than);
#else
  return larger(value, than);  // so that the emulator chooses among zeros as other kernels do
#endif
}
__device__ inline double larger_short(double value, double than) { return larger(value, than); }

// The value that is subtracted before exp: the row's maximum, or 0 for a row of -inf, so that exp
// gives 0 and not NaN.
template <typename T>
__device__ T softmax_shift(T high) {
  return high == kAbsent<T> ? T{0} : high;
}

// The factor of the exponentials: 1 over their sum, or 0 for a row of -inf, whose sum is 0. All
// other sums are at least 1.
template <typename T>
__device__ T softmax_scale(T total) {
  return total == 0 ? T{0} : T{1} / total;
}

// softmax_scale, with the same bits and without the branch of a division. The division takes the
// same steps for divisors in [1, 2^64], and the branch for all other divisors.
__device__ inline float softmax_scale_short(float total) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(total));
  return total == 0 ? 0.0f : fmaf(y, fmaf(-total, y, 1.0f), y);
#else
  return softmax_scale(total);
#endif
}
__device__ inline double softmax_scale_short(double total) { return softmax_scale(total); }

// The maximum over kLanes adjacent lanes, by `larger`. All lanes get the maximum.
template <int kLanes, typename T>
__device__ T max_of_lanes(T value) {
  for (int turn = kLanes / 2; turn > 0; turn /= 2) {
    value = larger(__shfl_xor_sync(kAllLanes, value, turn), value);
  }
  return value;
}

// The sum over kLanes adjacent lanes. All lanes get the same bits: a butterfly adds the same pairs
// on every lane.
template <int kLanes, typename T>
__device__ T sum_of_lanes(T value) {
  for (int turn = kLanes / 2; turn > 0; turn /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, turn);
  }
  return value;
}

// Number of sums of a lane that holds kEach entries of a row. If a row has fewer lanes than a warp,
// each sum has 4 entries. So the result has the same bits as with one lane per 4 entries.
template <int kLanes, int kEach>
constexpr int kSumsOfLane = kLanes < kWarp ? kEach / 4 : 1;

// The softmax of a row of up to kLanes * kEach entries, in the registers of kLanes lanes. Positions
// after the end of the row hold -inf, which adds 0 to the sum. kShort: fewer instructions, for the
// same bits, and up to 14 more registers.
template <typename T, int kLanes, int kEach, bool kShort = false>
struct RowSoftmax {
  static constexpr int kTogether = kWideEntries<T>;
  using Picks = Few<OrderKey<T>, kLanes, kEach, kTogether>;

  T powers[kEach];  // exp(entry - high)
  T high, scale;    // the norms of softmax_gather.h

  // All lanes of the warp must call this. wide: whether the row allows loads of 16 bytes.
  __device__ void read(const T* __restrict__ row, int n, bool wide) {
    high = kAbsent<T>;
    const bool whole = wide && n % kTogether == 0;  // no piece of 16 bytes ends after the row
#pragma unroll
    for (int i = 0; i < kEach; i += kTogether) {
      const int at = Picks::index(i);
      Wide<T> piece;
      if (!whole) {
        piece = load_entries(row, at, n, wide, kAbsent<T>);
      } else if (at < n) {
        piece = *reinterpret_cast<const Wide<T>*>(row + at);
      }
#pragma unroll
      for (int j = 0; j < kTogether; ++j) {
        powers[i + j] = whole && at >= n ? kAbsent<T> : piece.entry[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      high = kShort ? larger_short(powers[i], high) : larger(powers[i], high);
    }
    high = softmax_shift(max_of_lanes<kLanes>(high));
    constexpr int kSums = kSumsOfLane<kLanes, kEach>;
    T totals[kSums] = {};
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      powers[i] = exp_negative(powers[i] - high);
      totals[i / kTogether % kSums] += powers[i];
    }
#pragma unroll
    for (int i = 1; i < kSums; ++i) totals[0] += totals[i];
    const T total = sum_of_lanes<kLanes>(totals[0]);
    scale = kShort ? softmax_scale_short(total) : softmax_scale(total);
  }

  __device__ bool absent() const { return scale == 0; }
  __device__ T gate(int i) const { return powers[i] * scale; }
};

// The longest row for RowSoftmax. Longer rows take one block per row.
constexpr int64_t kLongestRow = 1024;

template <int kLanesOf, int kEachOf>
struct RowShape {
  static constexpr int kLanes = kLanesOf, kEach = kEachOf;
};

// Calls body(RowShape) with the template arguments of RowSoftmax for rows of n <= kLongestRow
// entries.
template <typename Body>
void by_row_length(int64_t n, Body&& body) {
  if (n <= 16) {
    body(RowShape<4, 4>{});
  } else if (n <= 32) {
    body(RowShape<4, 8>{});
  } else if (n <= 64) {
    body(RowShape<8, 8>{});
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

// The sum over a block of kSoftmaxThreads threads, in a fixed order. All threads must call this,
// and get the sum.
template <typename T>
__device__ T sum_of_block(T value) {
  constexpr int kWarps = kSoftmaxThreads / kWarp;
  __shared__ T of_warps[kWarps];
  value = sum_of_lanes<kWarp>(value);
  __syncthreads();  // all threads have read of_warps in an earlier call
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = 0;
  for (int warp = 0; warp < kWarps; ++warp) value += of_warps[warp];
  return value;
}

// The norms of one row of any length, by a block of kSoftmaxThreads threads. All threads must call
// this, and get the norms.
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
  // Lanes without a row read the last row: all lanes of a warp must take part in its shuffles.
  softmax.read(logits + (row < rows ? row : rows - 1) * n, static_cast<int>(n), wide);
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
