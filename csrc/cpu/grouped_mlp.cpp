#include "../grouped_mlp.h"

#include "../common/gelu.h"
#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

template <bool kTanh, typename T>
inline Gelu<Vec<T>> gelu(Vec<T> x) {
  return vmoe::gelu<kTanh, T>(x, Fused{}, [](Vec<T> v) { return exp(v); });
}

// Calls body(j, load, store) for each vector of a row. The last vector is padded with zeros, so
// that every entry gets the same arithmetic at any position.
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
      const Gelu<Vec<T>> at = gelu<kTanh, T>(v);
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
