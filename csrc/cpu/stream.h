// stream -- non-temporal stores, for outputs that are too large for the caches. An ordinary store
// first reads the cache line. This read is a third of the memory traffic of a copy. An ordinary
// store also evicts other lines from the cache.
#pragma once

#include <cstdint>

#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {

// Whether to stream an output. A small output stays in the caches for the next op.
inline bool streams(const void* out, int64_t rows, int64_t row_bytes) {
  constexpr int64_t kLarge = int64_t{1} << 25;
  // `stream` takes rows of whole, aligned vectors.
  const bool aligned = (reinterpret_cast<uintptr_t>(out) | row_bytes) % kVectorBytes == 0;
  return aligned && rows * row_bytes >= kLarge;
}

// Stores a vector, or half a vector, to an aligned address.
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

// Makes the stores visible to other threads. Call this function after the last `stream`.
inline void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace vmoe::cpu::VMOE_ISA
