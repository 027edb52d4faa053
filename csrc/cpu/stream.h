// stream -- stores past the caches, for an output that they would not keep anyway: a usual store
// reads the line first, a third of a copy's traffic, and puts out what others still need.
#pragma once

#include <cstdint>

#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {

// Whether to: below, the next op finds the output in the caches, which is worth more.
inline bool streams(const void* out, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kLarge = int64_t{1} << 25;
  // Rows of whole vectors, all of them aligned, are what `stream` takes.
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | row_bytes) % kVectorBytes == 0;
  return aligned && rows * row_bytes >= kLarge;
}

// A vector, or half of one, to where it is aligned.
template <typename V>
inline void stream(void* p, V v) {
#if defined(__x86_64__)
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) _mm512_stream_si512((__m512i*)p, (__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(V) == 32) _mm256_stream_si256((__m256i*)p, (__m256i)v);
#endif
  if constexpr (sizeof(V) == 16) _mm_stream_si128((__m128i*)p, (__m128i)v);
  if constexpr (sizeof(V) == 8) _mm_stream_si64((long long*)p, (long long)v);
#else
  memcpy(p, &v, sizeof(v));
#endif
}

// After the last of them: other threads see them from here on.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace vmoe::cpu::VMOE_ISA
