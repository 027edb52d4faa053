// half -- loads and stores of rows of any type, 16-bit types included. Loading widens 16-bit values
// to float. Storing rounds to nearest, ties to even. NaN stays NaN. Overflow gives infinity.
#pragma once

#include "../common/half.h"
#include "simd.h"
#include "stream.h"

namespace vmoe::cpu::VMOE_ISA {

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WideBits __attribute__((vector_size(kVectorBytes)));

inline Vec<float> widen(BFloat16, HalfBits half) {
  return (Vec<float>)(__builtin_convertvector(half, WideBits) << 16);
}

inline HalfBits narrow(BFloat16, Vec<float> v) {
  const auto bits = (WideBits)v;
  const WideBits rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  const WideBits quiet = bits >> 16 | 0x40;  // rounding could turn a NaN into infinity
  return __builtin_convertvector(v == v ? rounded : quiet, HalfBits);
}

inline Vec<float> widen(Float16, HalfBits half) {
#if defined(__AVX512F__)
  // Masked intrinsics are used here and below, because GCC 12 warns of an uninitialised register in
  // the unmasked intrinsics.
  return (Vec<float>)_mm512_maskz_cvtph_ps(0xFFFF, (__m256i)half);
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps((__m128i)half);
#else
  const WideBits wide = __builtin_convertvector(half, WideBits);
  const WideBits magnitude = (wide & 0x7FFF) << 13, sign = (wide & 0x8000) << 16;
  // Changes the exponent's bias from 15 to 127. A subnormal s is computed as (2^-14 + s) - 2^-14,
  // so that no intermediate float is subnormal. A thread may be set to flush subnormal floats to 0.
  const WideBits least = WideBits{} + (113u << 23);
  const WideBits normal = magnitude + (112u << 23), special = magnitude + (224u << 23);
  const auto subnormal = (WideBits)((Vec<float>)(magnitude + least) - (Vec<float>)least);
  const WideBits finite = magnitude < (1u << 23) ? subnormal : normal;
  return (Vec<float>)(sign | (magnitude < (31u << 23) ? finite : special));
#endif
}

inline HalfBits narrow(Float16, Vec<float> v) {
#if defined(__AVX512F__)
  return (HalfBits)_mm512_maskz_cvtps_ph(
      0xFFFF, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const WideBits bits = (WideBits)v & 0x7FFFFFFF, sign = ((WideBits)v & 0x80000000u) >> 16;
  // Below 2^-14, adding 0.5 rounds the result into the last bits. From 2^-14 on, rounding may carry
  // into the exponent, up to infinity, which is correct.
  const WideBits half = WideBits{} + (126u << 23);
  const WideBits subnormal = (WideBits)((Vec<float>)bits + (Vec<float>)half) - half;
  const WideBits normal = (bits - (112u << 23) + 0xFFF + (bits >> 13 & 1)) >> 13;
  const WideBits finite = bits < (113u << 23) ? subnormal : normal;
  const WideBits special = bits > (255u << 23) ? WideBits{} + 0x7E00 : WideBits{} + 0x7C00;
  return __builtin_convertvector(sign | (bits < (143u << 23) ? finite : special), HalfBits);
#endif
}

// Loads a vector from a row of any type, in the type in which it is computed.
template <typename Row>
inline Vec<Compute<Row>> load_wide(const Row* p) {
  if constexpr (sizeof(Row) == 2) {
    HalfBits half;
    memcpy(&half, p, sizeof(half));
    return widen(Row{}, half);
  } else {
    return load(p);
  }
}

template <bool kStream = false, typename Row>
inline void store_narrow(Row* p, Vec<Compute<Row>> v) {
  const auto narrowed = [&] {
    if constexpr (sizeof(Row) == 2) {
      return narrow(Row{}, v);
    } else {
      return v;
    }
  }();
  if constexpr (kStream) {
    stream(p, narrowed);
  } else {
    memcpy(p, &narrowed, sizeof(narrowed));
  }
}

// Loads the first `count` < width entries. The remaining lanes of the vector are 0.
template <typename Row>
inline Vec<Compute<Row>> load_wide(const Row* p, int64_t count) {
  if constexpr (sizeof(Row) == 2) {
    HalfBits half{};
    memcpy(&half, p, count * sizeof(Row));
    return widen(Row{}, half);
  } else {
    return load_some(p, count, Row{0});
  }
}

template <typename Row>
inline void store_narrow(Row* p, Vec<Compute<Row>> v, int64_t count) {
  if constexpr (sizeof(Row) == 2) {
    const HalfBits half = narrow(Row{}, v);
    memcpy(p, &half, count * sizeof(Row));
  } else {
    store_some(p, v, count);
  }
}

}  // namespace vmoe::cpu::VMOE_ISA
