// cuda_fp16 -- emulates the float16 conversions that the kernels use.
#pragma once

#include <cuda_runtime.h>

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float sign = value.bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}
inline __half __float2half_rn(float value) {
  const auto sign = static_cast<unsigned short>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) return {0x7FFF};
  const float size = std::abs(value);
  if (size >= 65520) return {static_cast<unsigned short>(sign | 0x7C00)};
  // Rounds to units in the last place. The unit does not shrink below 2^-14 (subnormal numbers).
  // nearbyint rounds ties to even. A carry into the exponent gives the correct bits.
  const int exponent = size < 0x1p-14f ? -14 : std::ilogb(size);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(size, 10 - exponent)));
  return {static_cast<unsigned short>(sign | (units + ((exponent + 14) << 10)))};
}
