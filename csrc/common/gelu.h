// gelu -- GELU and its derivative, for every device.
//
//   tanh form:  x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))   (arXiv 1606.08415)
//   exact:      x Phi(x), where Phi is the standard normal distribution function
//
// T is float or double. V is T or a vector of T. fused(a, b, c) is a * b + c, and exp(v) is e^v.
#pragma once

#include <type_traits>

#include "order.h"

namespace vmoe {

template <typename V>
struct Gelu {
  V value, slope;
};

// a / b. On a GPU a float quotient has an error of up to 2 units in the last place. An exactly
// rounded quotient would take ten more instructions.
template <typename V>
VMOE_HOST_DEVICE inline V quotient(V a, V b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<V, float>) return __fdividef(a, b);
#endif
  return a / b;
}

template <typename T, typename V, typename Fused, typename Exp>
VMOE_HOST_DEVICE inline Gelu<V> gelu_tanh(V x, Fused fused, Exp exp) {
  constexpr T scale = T(1.59576912160573071), cubic = T(0.044715) * scale;  // 2 sqrt(2 / pi)
  const V zero{};  // `constant - zero` has type V; the compiler folds the subtraction
  // From |x| = 100 on, the gate is exactly 0 or 1. Clamping x^2 to the bound keeps the derivative
  // at a larger |x| from becoming 0 * infinity.
  const V exact = x * x, bound = T{10000} - zero;
  const V square = exact < bound ? exact : bound;
  const V inner = x * fused(square, cubic - zero, scale - zero);
  const V gate = quotient<V>(T{1} - zero, T{1} + exp(-inner));
  const V inner_slope = fused(square, 3 * cubic - zero, scale - zero);
  return {x * gate, fused(x * gate * (T{1} - gate), inner_slope, gate)};
}

// exp(z^2) erfc(z) = t p(2 t - 1) for z >= 0, with t = centre / (centre + z). The polynomial p is a
// Chebyshev fit for z in [0, infinity], with an error below 5e-8 (float, centre 2) and 1e-16
// (double, centre 4).
template <typename V, typename Fused>
VMOE_HOST_DEVICE inline V erfcx_polynomial(float, V s, Fused fused) {
  constexpr float c[] = {-3.627002806e-5f, -1.934479147e-4f, 4.298832073e-4f, 1.43586135e-3f,
                         -3.24281985e-3f,  -1.071801614e-2f, 1.822147708e-2f, 1.397314807e-1f,
                         3.435803351e-1f,  5.107914436e-1f};
  const V zero{};
  V p = c[0] - zero;
  for (int i = 1; i < 10; ++i) p = fused(p, s, c[i] - zero);
  return p;
}

template <typename V, typename Fused>
VMOE_HOST_DEVICE inline V erfcx_polynomial(double, V s, Fused fused) {
  constexpr double c[] = {3.130423070529455e-10,   -6.617942512486173e-11, -3.880515697903128e-9,
                          -2.0691219034054745e-10, 3.0779018556397429e-8,  1.8994402187265252e-8,
                          -2.1111037846283067e-7,  -3.562393200959625e-7,  1.1732609498291666e-6,
                          4.7153704444939411e-6,   -9.0863950935908617e-7, -4.4203271189299235e-5,
                          -1.1376321237622333e-4,  7.0239734298640223e-5,  1.5280139205288012e-3,
                          6.5925133322374861e-3,   1.9095378726752159e-2,  4.3502734310228923e-2,
                          8.2712896969525848e-2,   1.3521345782829913e-1,  1.9330217556630901e-1,
                          2.4413718227022061e-1,   2.7399891525012278e-1};
  const V zero{};
  V p = c[0] - zero;
  for (int i = 1; i < 23; ++i) p = fused(p, s, c[i] - zero);
  return p;
}

template <typename T, typename V, typename Fused, typename Exp>
VMOE_HOST_DEVICE inline Gelu<V> gelu_exact(V x, Fused fused, Exp exp) {
  constexpr T centre = std::is_same_v<T, float> ? 2 : 4;
  constexpr T root_half = T(0.707106781186547524), density_scale = T(0.398942280401432678);
  const V z = root_half * (x < T{0} ? -x : x);
  const V decay = exp(T(-0.5) * x * x);
  const V t = quotient<V>(centre - V{}, centre + z);
  const V tail = T(0.5) * decay * t * erfcx_polynomial(T{}, t + t - T{1}, fused);  // Phi(-|x|)
  const V below = x < T{0} ? tail : T{1} - tail;
  return {x * below, fused(x, density_scale * decay, below)};
}

template <bool kTanh, typename T, typename V, typename Fused, typename Exp>
VMOE_HOST_DEVICE inline Gelu<V> gelu(V x, Fused fused, Exp exp) {
  if constexpr (kTanh) {
    return gelu_tanh<T>(x, fused, exp);
  } else {
    return gelu_exact<T>(x, fused, exp);
  }
}

}  // namespace vmoe
