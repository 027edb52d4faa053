// simd -- a small vector layer of generic width, so that every kernel is written once.
//
// The layer uses the vector extension of GCC and Clang. The compiler chooses the instructions of
// the ISA level for which it compiles a file (../common/isa.h). Intrinsics are used only for
// operations that the extension lacks, such as fused multiply-add, masked loads and compress.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../common/exp.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace vmoe::cpu::VMOE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <>
struct IntOf<int32_t> {
  using type = int32_t;
};
template <>
struct IntOf<int64_t> {
  using type = int64_t;
};

// Vec<T>: kVectorBytes of T, a floating-point type or a signed integer. Mask<T>: integers of the
// size of T, with all bits set where true.
template <typename T>
struct Lanes {
  static constexpr int64_t width = kVectorBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef typename IntOf<T>::type Mask __attribute__((vector_size(kVectorBytes)));
  // The unaligned type, for loads and stores. If memcpy were used, the compiler would not keep the
  // stored vectors in registers.
  typedef T Stored __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};
template <typename T>
using Vec = typename Lanes<T>::Vec;
template <typename T>
using Mask = typename Lanes<T>::Mask;
template <typename T>
constexpr int64_t kWidth = Lanes<T>::width;

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Lanes<T>::Stored*>(p);
}

template <typename T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Lanes<T>::Stored*>(p) = v;
}

template <typename T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};  // the compiler folds x - 0, but not x + 0, which changes x = -0
}

// 0, 1, 2, ... as integers of Mask<T>.
template <typename T>
inline Mask<T> lane_index() {
  return []<int... J>(std::integer_sequence<int, J...>) {
    return Mask<T>{J...};
  }(std::make_integer_sequence<int, kWidth<T>>{});
}

// Loads the first `count` < width entries. The remaining lanes are `fill`. Uses masked loads if the
// ISA level has them, because a vector assembled in memory is slow to load.
template <typename T>
inline Vec<T> load_some(const T* p, int64_t count, T fill) {
#if defined(__AVX512F__)
  const uint32_t first = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask_loadu_epi32((__m512i)splat(fill), first, p);
  } else {
    return (Vec<T>)_mm512_mask_loadu_epi64((__m512i)splat(fill), first, p);
  }
#elif defined(__AVX2__)
  const Mask<T> first = lane_index<T>() < static_cast<typename IntOf<T>::type>(count);
  if constexpr (sizeof(T) == 4) {
    const auto v = (Vec<T>)_mm256_maskload_epi32((const int*)p, (__m256i)first);
    return first ? v : splat(fill);
  } else {
    const auto v = (Vec<T>)_mm256_maskload_epi64((const long long*)p, (__m256i)first);
    return first ? v : splat(fill);
  }
#else
  Vec<T> v = splat(fill);
  memcpy(&v, p, count * sizeof(T));
  return v;
#endif
}

// Loads the vector at `p`, with 0 for entries at or past `end`, which are not read.
template <typename T>
inline Vec<T> load_within(const T* p, const T* end) {
  return end - p >= kWidth<T> ? load(p) : load_some(p, end - p, T{0});
}

template <typename T>
inline void store_some(T* p, Vec<T> v, int64_t count) {
#if defined(__AVX512F__)
  const uint32_t first = (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_epi32(p, first, (__m512i)v);
  } else {
    _mm512_mask_storeu_epi64(p, first, (__m512i)v);
  }
#elif defined(__AVX2__)
  const Mask<T> first = lane_index<T>() < static_cast<typename IntOf<T>::type>(count);
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_epi32((int*)p, (__m256i)first, (__m256i)v);
  } else {
    _mm256_maskstore_epi64((long long*)p, (__m256i)first, (__m256i)v);
  }
#else
  memcpy(p, &v, count * sizeof(T));
#endif
}

// load_some for any `count`: from `width` on, loads the whole vector.
template <typename T>
inline Vec<T> get(const T* p, int64_t count, T fill) {
  return count >= kWidth<T> ? load(p) : load_some(p, count, fill);
}

template <typename T>
inline void put(T* p, Vec<T> v, int64_t count) {
  count >= kWidth<T> ? store(p, v) : store_some(p, v, count);
}

template <typename T>
inline Vec<T> max(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
inline Vec<T> min(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}

// Converts the mask to bits: bit i is lane i.
template <typename T>
inline uint32_t lane_bits(Mask<T> mask) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)mask);
  return _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_movemask_ps((__m256)mask);
  return _mm256_movemask_pd((__m256d)mask);
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps((__m128)mask);
  return _mm_movemask_pd((__m128d)mask);
#else
  uint32_t bits = 0;
  for (int64_t lane = 0; lane < kWidth<T>; ++lane) bits |= (mask[lane] & 1u) << lane;
  return bits;
#endif
}

// a * b + c, rounded once if the ISA level has the instruction.
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__aarch64__)
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// a * b - product, the rounding error of `product`.
inline Vec<float> product_error(Vec<float> a, Vec<float> b, Vec<float> product) {
#if defined(__FMA__) || defined(__aarch64__)
  return fma(a, b, -product);
#else
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
  const Wide exact = __builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide);
  return __builtin_convertvector(exact - __builtin_convertvector(product, Wide), Vec<float>);
#endif
}

inline Vec<double> sqrt(Vec<double> v) {
#if defined(__AVX512F__)
  // A masked intrinsic, because GCC 12 warns of an uninitialised register in the unmasked
  // intrinsic.
  return (Vec<double>)_mm512_maskz_sqrt_pd(0xFF, (__m512d)v);
#elif defined(__AVX2__)
  return (Vec<double>)_mm256_sqrt_pd((__m256d)v);
#elif defined(__x86_64__)
  return (Vec<double>)_mm_sqrt_pd((__m128d)v);
#elif defined(__aarch64__)
  return (Vec<double>)vsqrtq_f64((float64x2_t)v);
#else
  for (int64_t i = 0; i < kWidth<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// Adds lane i + kHalf to lane i, then repeats at half the distance: a tree within registers.
template <typename T, int64_t kHalf, int... J>
inline Vec<T> sum_round(Vec<T> v, std::integer_sequence<int, J...>) {
  return v + __builtin_shufflevector(v, v, ((J + kHalf) % kWidth<T>)...);
}

template <typename T, int64_t kHalf = kWidth<T> / 2>
inline T sum(Vec<T> v) {
  v = sum_round<T, kHalf>(v, std::make_integer_sequence<int, kWidth<T>>{});
  if constexpr (kHalf > 1) {
    return sum<T, kHalf / 2>(v);
  } else {
    return v[0];
  }
}

// fma as an argument for the functions of common/. Fused is a type in the namespace of this ISA
// level, so that instances of templates differ between levels.
struct Fused {
  template <typename V>
  V operator()(V a, V b, V c) const {
    return fma(a, b, c);
  }
};

// e^x. The relative error is below 2e-7 (float) and 5e-16 (double) if the result is a normal
// number. Smaller results are 0. Larger results are infinity. NaN stays NaN.
template <typename V, typename T = std::remove_reference_t<decltype(V{}[0])>>
inline V exp(V x) {
  using Of = ExpOf<T>;
  const V low = splat(Of::low), high = splat(Of::high), to_integer = splat(Of::to_integer);
  V y = x < low ? low : x;
  y = y > high ? high : y;
  const V shifted = fma(y, splat(Of::log2_e), to_integer);
  const V n = shifted - to_integer;
  const V r = fma(n, splat(-Of::ln2_rest), fma(n, splat(-Of::ln2), y));
  // Computes 2^n as a product of two powers, so that the largest n does not overflow the exponent
  // field.
  const Mask<T> k = (Mask<T>)shifted - (Mask<T>)to_integer;
  const Mask<T> half = k >> 1;
  const V a = (V)((half + Of::bias) << Of::mantissa);
  const V b = (V)((k - half + Of::bias) << Of::mantissa);
  const V p = Of::reduced(r, Fused{}) * a * b;
  const V from_low = x < low ? V{} : p;
  return x > high ? splat(std::numeric_limits<T>::infinity()) : from_low;
}

// e^x for x <= 0 or NaN, the arguments of a softmax, with two thirds of the instructions of exp.
template <typename V, typename T = std::remove_reference_t<decltype(V{}[0])>>
inline V exp_negative(V x) {
  return vmoe::exp_negative<T>(
      x, Fused{}, [](V v) { return (V)((Mask<T>)v << ExpOf<T>::mantissa); });
}

// ln(x) of a normal number, with a relative error below 3e-16: fdlibm's e_log without its special
// cases.
inline Vec<double> log(Vec<double> x) {
  // x = 2^k m with m in [1/sqrt(2), sqrt(2)).
  const Mask<double> above = (Mask<double>)x - 0x3fe6a09e667f3bcd;
  const Mask<double> k = above >> 52;
  const Vec<double> m = (Vec<double>)((Mask<double>)x - (k << 52));
  const Vec<double> n = __builtin_convertvector(k, Vec<double>);
  const Vec<double> f = m - 1.0, s = f / (f + 2.0), z = s * s, half = 0.5 * f * f;
  Vec<double> p = splat(1.479819860511658591e-1);
  p = fma(p, z, splat(1.531383769920937332e-1));
  p = fma(p, z, splat(1.818357216161805012e-1));
  p = fma(p, z, splat(2.222219843214978396e-1));
  p = fma(p, z, splat(2.857142874366239149e-1));
  p = fma(p, z, splat(3.999999999940941908e-1));
  p = fma(p, z, splat(6.666666666666735130e-1));
  const Vec<double> low = fma(s, fma(p, z, half), n * 1.90821492927058770002e-10);
  return n * 6.93147180369123816490e-01 - ((half - low) - f);
}

// Transposes `width` vectors of `width` lanes in log2(width) rounds. A round exchanges blocks of
// lanes between the vectors i and i + kBlock.
template <typename T, int64_t kBlock, int... J>
inline void transpose_round(Vec<T>* r, std::integer_sequence<int, J...>) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t i = 0; i < W; ++i) {
    if (i & kBlock) continue;
    const Vec<T> a = r[i], b = r[i + kBlock];
    r[i] = __builtin_shufflevector(a, b, ((J & kBlock) ? W + J - kBlock : J)...);
    r[i + kBlock] = __builtin_shufflevector(a, b, ((J & kBlock) ? W + J : J + kBlock)...);
  }
}

template <typename T, int64_t kBlock = kWidth<T> / 2>
inline void transpose(Vec<T>* r) {
  transpose_round<T, kBlock>(r, std::make_integer_sequence<int, kWidth<T>>{});
  if constexpr (kBlock > 1) transpose<T, kBlock / 2>(r);
}

// Writes the lanes of `v` set in `mask`, in order, and returns their number. May overwrite up to
// `width` entries of `out`.
template <typename T>
inline int64_t compress(T* out, Mask<T> mask, Vec<T> v) {
#if defined(__AVX512F__)
  // Compresses in a register, because compressing to memory is microcode on some CPUs.
  const uint32_t bits = lane_bits<T>(mask);
  if constexpr (sizeof(T) == 4) {
    store(out, (Vec<T>)_mm512_maskz_compress_epi32(bits, (__m512i)v));
  } else {
    store(out, (Vec<T>)_mm512_maskz_compress_epi64(bits, (__m512i)v));
  }
  return __builtin_popcount(bits);
#else
  int64_t count = 0;
  for (int64_t lane = 0; lane < kWidth<T>; ++lane) {
    out[count] = v[lane];
    count -= mask[lane];  // true is -1
  }
  return count;
#endif
}

// The same as compress, but writes index + lane for the lanes set in `mask`.
template <typename T>
inline int64_t compress_index(int32_t* out, Mask<T> mask, int32_t index) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return compress<int32_t>(out, mask, lane_index<T>() + index);
  } else {
    const uint32_t bits = lane_bits<T>(mask);
    const __m256i lanes =
        _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_set1_epi32(index));
    _mm256_storeu_si256((__m256i*)out, _mm256_maskz_compress_epi32(bits, lanes));
    return __builtin_popcount(bits);
  }
#else
  int64_t count = 0;
  for (int64_t lane = 0; lane < kWidth<T>; ++lane) {
    out[count] = index + static_cast<int32_t>(lane);
    count -= mask[lane];  // true is -1
  }
  return count;
#endif
}

}  // namespace vmoe::cpu::VMOE_ISA
