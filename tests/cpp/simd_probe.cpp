#include "simd_probe.h"

#include "cpu/half.h"
#include "cpu/simd.h"

namespace vmoe::cpu::VMOE_ISA {

void vector_bytes(int64_t* bytes) { *bytes = kVectorBytes; }

template <typename T>
void exp_each(const T* x, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth<T> <= n; i += kWidth<T>) store(out + i, exp(load(x + i)));
  if (i < n) store_some(out + i, exp(load_some(x + i, n - i, T{0})), n - i);
}

template <typename T>
void exp_negative_each(const T* x, T* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<T>) {
    put(out + i, exp_negative(get(x + i, n - i, T{0})), n - i);
  }
}

void log_each(const double* x, double* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<double>) store(out + i, log(load(x + i)));
}

void sqrt_each(const double* x, double* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<double>) store(out + i, sqrt(load(x + i)));
}

void product_error_each(const float* a, const float* b, float* out, int64_t n) {
  for (int64_t i = 0; i < n; i += kWidth<float>) {
    const Vec<float> x = load(a + i), y = load(b + i);
    store(out + i, product_error(x, y, x * y));
  }
}

template <typename T>
void transpose_block(const T* x, T* out) {
  Vec<T> block[kWidth<T>];
  for (int64_t r = 0; r < kWidth<T>; ++r) block[r] = load(x + r * kWidth<T>);
  transpose<T>(block);
  for (int64_t r = 0; r < kWidth<T>; ++r) store(out + r * kWidth<T>, block[r]);
}

template <typename T>
void compress_vector(
    const T* x, const int32_t* chosen, int32_t first, T* entries, int32_t* places, uint32_t* bits) {
  Mask<T> mask{};
  for (int64_t i = 0; i < kWidth<T>; ++i) mask[i] = -chosen[i];
  compress<T>(entries, mask, load(x));
  compress_index<T>(places, mask, first);
  *bits = lane_bits<T>(mask);
}

template <typename T>
void copy_some(const T* x, int64_t count, T fill, T* all, T* out) {
  const Vec<T> v = load_some(x, count, fill);
  store(all, v);
  store_some(out, v, count);
}

template <typename T>
void sum_vector(const T* x, T* out) {
  *out = sum<T>(load(x));
}

template <typename Half>
void widen_each(const Half* x, float* out, int64_t n) {
  constexpr int64_t W = kWidth<float>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store(out + i, load_wide(x + i));
  if (i < n) store_some(out + i, load_wide(x + i, n - i), n - i);
}

template <typename Half>
void narrow_each(const float* x, Half* out, int64_t n) {
  constexpr int64_t W = kWidth<float>;
  int64_t i = 0;
  for (; i + W <= n; i += W) store_narrow(out + i, load(x + i));
  if (i < n) store_narrow(out + i, load_some(x + i, n - i, 0.0f), n - i);
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void exp_each(const T*, T*, int64_t);                                                   \
  template void exp_negative_each(const T*, T*, int64_t);                                          \
  template void transpose_block(const T*, T*);                                                     \
  template void compress_vector(const T*, const int32_t*, int32_t, T*, int32_t*, uint32_t*);       \
  template void copy_some(const T*, int64_t, T, T*, T*);                                           \
  template void sum_vector(const T*, T*);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

#define VMOE_INSTANTIATE(Half)                                                                     \
  template void widen_each(const Half*, float*, int64_t);                                          \
  template void narrow_each(const float*, Half*, int64_t);
VMOE_INSTANTIATE(BFloat16)
VMOE_INSTANTIATE(Float16)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
