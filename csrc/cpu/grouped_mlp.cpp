#include "../grouped_mlp.h"

#include <cmath>
#include <numbers>
#include <type_traits>

#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

template <typename T>
struct Gelu {
  Vec<T> value, slope;
};

template <typename T>
inline Gelu<T> gelu_tanh(Vec<T> x) {
  const T scale = 2 * std::sqrt(2 / std::numbers::pi_v<T>), cubic = T(0.044715) * scale;
  const Vec<T> square = x * x;
  const Vec<T> inner = x * fma(square, splat(cubic), splat(scale));
  const Vec<T> gate = T{1} / (T{1} + exp(-inner));
  const Vec<T> inner_slope = fma(square, splat(3 * cubic), splat(scale));
  return {x * gate, fma(x * gate * (T{1} - gate), inner_slope, gate)};
}

// exp(z^2) erfc(z) for z >= 0 is t p(2 t - 1) with t = centre / (centre + z): Chebyshev fits on
// [0, infinity], within 5e-8 (float, centre 2) and 1e-16 (double, centre 4).
inline Vec<float> erfcx_polynomial(Vec<float> s) {
  constexpr float c[] = {-3.627002806e-5f, -1.934479147e-4f, 4.298832073e-4f, 1.43586135e-3f,
                         -3.24281985e-3f,  -1.071801614e-2f, 1.822147708e-2f, 1.397314807e-1f,
                         3.435803351e-1f,  5.107914436e-1f};
  Vec<float> p = splat(c[0]);
  for (int i = 1; i < 10; ++i) p = fma(p, s, splat(c[i]));
  return p;
}

inline Vec<double> erfcx_polynomial(Vec<double> s) {
  constexpr double c[] = {3.130423070529455e-10,   -6.617942512486173e-11, -3.880515697903128e-9,
                          -2.0691219034054745e-10, 3.0779018556397429e-8,  1.8994402187265252e-8,
                          -2.1111037846283067e-7,  -3.562393200959625e-7,  1.1732609498291666e-6,
                          4.7153704444939411e-6,   -9.0863950935908617e-7, -4.4203271189299235e-5,
                          -1.1376321237622333e-4,  7.0239734298640223e-5,  1.5280139205288012e-3,
                          6.5925133322374861e-3,   1.9095378726752159e-2,  4.3502734310228923e-2,
                          8.2712896969525848e-2,   1.3521345782829913e-1,  1.9330217556630901e-1,
                          2.4413718227022061e-1,   2.7399891525012278e-1};
  Vec<double> p = splat(c[0]);
  for (int i = 1; i < 23; ++i) p = fma(p, s, splat(c[i]));
  return p;
}

template <typename T>
inline Gelu<T> gelu_exact(Vec<T> x) {
  constexpr T centre = std::is_same_v<T, float> ? 2 : 4;
  const T root_half = 1 / std::numbers::sqrt2_v<T>;
  const T density_scale = root_half * std::numbers::inv_sqrtpi_v<T>;
  const Vec<T> z = root_half * (x < T{0} ? -x : x);
  const Vec<T> decay = exp(T(-0.5) * x * x);
  const Vec<T> t = centre / (centre + z);
  const Vec<T> tail = T(0.5) * decay * t * erfcx_polynomial(t + t - T{1});  // Phi(-|x|)
  const Vec<T> below = x < T{0} ? tail : T{1} - tail;
  return {x * below, fma(x, density_scale * decay, below)};
}

template <bool kTanh, typename T>
inline Gelu<T> gelu(Vec<T> x) {
  if constexpr (kTanh) {
    return gelu_tanh<T>(x);
  } else {
    return gelu_exact<T>(x);
  }
}

// body(j, load, store): vectors of a row, the last one of it filled up with zeros, so that
// every entry gets the same arithmetic wherever it stands.
template <typename T, typename Body>
inline void each_vector(int64_t columns, Body&& body) {
  constexpr int64_t W = kWidth<T>;
  int64_t j = 0;
  for (; j + W <= columns; j += W) {
    body(j, [](const T* p) { return load(p); }, [](T* p, Vec<T> v) { store(p, v); });
  }
  if (const int64_t count = columns - j; count > 0) {
    body(
        j, [=](const T* p) { return load_some(p, count, T{0}); },
        [=](T* p, Vec<T> v) { store_some(p, v, count); });
  }
}

template <bool kTanh, typename T>
void each_gelu(const T* x, const T* bias, T* out, int64_t rows, int64_t columns, int64_t x_stride) {
  for (int64_t i = 0; i < rows; ++i, x += x_stride, out += columns) {
    each_vector<T>(columns, [&](int64_t j, auto load, auto store) {
      Vec<T> v = load(x + j);
      if (bias) v += load(bias + j);
      store(out + j, gelu<kTanh, T>(v).value);
    });
  }
}

template <bool kTanh, typename T>
void each_gelu_backward(
    const T* x, const T* bias, T* out, T* grad, T* grad_bias, int64_t rows, int64_t columns,
    int64_t x_stride) {
  for (int64_t i = 0; i < rows; ++i, x += x_stride, out += columns, grad += columns) {
    each_vector<T>(columns, [&](int64_t j, auto load, auto store) {
      Vec<T> v = load(x + j);
      if (bias) v += load(bias + j);
      const Gelu<T> at = gelu<kTanh, T>(v);
      const Vec<T> g = load(grad + j) * at.slope;
      store(out + j, at.value);
      store(grad + j, g);
      if (grad_bias) store(grad_bias + j, load(grad_bias + j) + g);
    });
  }
}

}  // namespace

template <typename T>
void bias_gelu(
    const T* x, const T* bias, T* out, int64_t rows, int64_t columns, int64_t x_stride, bool tanh) {
  if (tanh) {
    each_gelu<true>(x, bias, out, rows, columns, x_stride);
  } else {
    each_gelu<false>(x, bias, out, rows, columns, x_stride);
  }
}

template <typename T>
void bias_gelu_backward(
    const T* x, const T* bias, T* out, T* grad, T* grad_bias, int64_t rows, int64_t columns,
    int64_t x_stride, bool tanh) {
  if (tanh) {
    each_gelu_backward<true>(x, bias, out, grad, grad_bias, rows, columns, x_stride);
  } else {
    each_gelu_backward<false>(x, bias, out, grad, grad_bias, rows, columns, x_stride);
  }
}

template <typename T>
void add_bias(const T* x, const T* bias, T* out, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i, x += columns, out += columns) {
    each_vector<T>(columns, [&](int64_t j, auto load, auto store) {
      store(out + j, bias ? load(x + j) + load(bias + j) : load(x + j));
    });
  }
}

template <typename T>
void add_rows(const T* x, T* sum, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i, x += columns) {
    each_vector<T>(columns, [&](int64_t j, auto load, auto store) {
      store(sum + j, load(sum + j) + load(x + j));
    });
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void bias_gelu(const T*, const T*, T*, int64_t, int64_t, int64_t, bool);                \
  template void bias_gelu_backward(                                                                \
      const T*, const T*, T*, T*, T*, int64_t, int64_t, int64_t, bool);                            \
  template void add_bias(const T*, const T*, T*, int64_t, int64_t);                                \
  template void add_rows(const T*, T*, int64_t, int64_t);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
