// exp -- the exponential function of all kernels, on every device.
//
// With x = n ln(2) + r and |r| <= ln(2) / 2, e^x = 2^n e^r. Every device does the same operations.
// So the same arguments underflow to 0 on every device, and the same values tie.
#pragma once

#include "order.h"

namespace vmoe {

template <typename T>
struct ExpOf;
template <>
struct ExpOf<float> {
  static constexpr float low = -87.33654f, high = 88.72284f;
  static constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float log2_e = 1.44269504f, ln2 = 0.693359375f, ln2_rest = -2.12194440e-4f;
  static constexpr int mantissa = 23, bias = 127;

  // e^r. V is a float or a vector of floats. fused(a, b, c) is a * b + c.
  template <typename V, typename Fused>
  static VMOE_HOST_DEVICE inline V reduced(V r, Fused fused) {
    const V zero{};  // `constant - zero` has type V; the compiler folds the subtraction
    V p = 1.9875691500e-4f - zero;
    p = fused(p, r, 1.3981999507e-3f - zero);
    p = fused(p, r, 8.3334519073e-3f - zero);
    p = fused(p, r, 4.1665795894e-2f - zero);
    p = fused(p, r, 1.6666665459e-1f - zero);
    p = fused(p, r, 5.0000001201e-1f - zero);
    return fused(p, r * r, r) + 1.0f;
  }
};
template <>
struct ExpOf<double> {
  static constexpr double low = -708.3964185322641, high = 709.782712893384;
  static constexpr double to_integer = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double log2_e = 1.4426950408889634;
  static constexpr double ln2 = 6.93145751953125e-1, ln2_rest = 1.42860682030941723212e-6;
  static constexpr int mantissa = 52, bias = 1023;

  template <typename V, typename Fused>
  static VMOE_HOST_DEVICE inline V reduced(V r, Fused fused) {
    const V zero{};
    V p = 1.0 / 6227020800 - zero;  // Taylor to r^13
    p = fused(p, r, 1.0 / 479001600 - zero);
    p = fused(p, r, 1.0 / 39916800 - zero);
    p = fused(p, r, 1.0 / 3628800 - zero);
    p = fused(p, r, 1.0 / 362880 - zero);
    p = fused(p, r, 1.0 / 40320 - zero);
    p = fused(p, r, 1.0 / 5040 - zero);
    p = fused(p, r, 1.0 / 720 - zero);
    p = fused(p, r, 1.0 / 120 - zero);
    p = fused(p, r, 1.0 / 24 - zero);
    p = fused(p, r, 1.0 / 6 - zero);
    p = fused(p, r, 0.5 - zero);
    return fused(p, r * r, r) + 1.0;
  }
};

// e^x for x <= 0 or NaN, the arguments of a softmax. The relative error is below 2e-7 (float) and
// 5e-16 (double). Results below the smallest normal number are 0. NaN stays NaN. exponent(v)
// returns the number whose exponent field holds the last bits of v, with a mantissa of 0.
template <typename T, typename V, typename Fused, typename Exponent>
VMOE_HOST_DEVICE inline V exp_negative(V x, Fused fused, Exponent exponent) {
  using Of = ExpOf<T>;
  const V zero{};
  // The last bits of `shifted` hold n + bias, which is the exponent field of 2^n.
  const V low = Of::low - zero, to_integer = Of::to_integer + Of::bias - zero;
  const V y = x < low ? low : x;
  const V shifted = fused(y, Of::log2_e - zero, to_integer);
  const V n = shifted - to_integer;
  const V r = fused(n, -Of::ln2_rest - zero, fused(n, -Of::ln2 - zero, y));
  const V p = Of::reduced(r, fused) * exponent(shifted);
  return x < low ? zero : p;
}

}  // namespace vmoe
