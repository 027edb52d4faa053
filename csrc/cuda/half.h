// half -- loads and stores of rows in any dtype of common/half.h. 16-bit values are widened to
// float in registers. Stores round float values to nearest, ties to even.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/half.h"
#include "launch.h"

namespace vmoe::cuda {

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(BFloat16 value) {
  return __bfloat162float(__ushort_as_bfloat16(value.bits));
}
__device__ inline float widen(Float16 value) { return __half2float(__ushort_as_half(value.bits)); }

template <typename Row>
__device__ Row narrow(Compute<Row> value) {
  return value;
}
template <>
__device__ inline BFloat16 narrow<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ inline Float16 narrow<Float16>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

// kEntries adjacent entries of a row, which a lane loads or stores in one instruction.
template <typename Row, int kEntries>
struct alignas(kEntries * sizeof(Row)) Piece {
  Row entry[kEntries];
};

template <int kEntries, typename Row>
__device__ Piece<Row, kEntries> load_piece(const Row* row, int64_t piece) {
  return reinterpret_cast<const Piece<Row, kEntries>*>(row)[piece];
}
template <int kEntries, typename Row>
__device__ void store_piece(Row* row, int64_t piece, const Piece<Row, kEntries>& value) {
  reinterpret_cast<Piece<Row, kEntries>*>(row)[piece] = value;
}

}  // namespace vmoe::cuda
