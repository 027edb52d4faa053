#include "../soft_logits.h"

#include <cmath>

namespace vmoe::cpu::VMOE_ISA {
namespace {

// The dot product of a and b, in kParts partial sums. The term with index i is added to partial sum
// i modulo kParts. The compiler can vectorise the partial sums. Every ISA level adds in the same
// order.
template <typename T>
double dot(const T* a, const T* b, int64_t D) {
  constexpr int64_t kParts = 16;
  double parts[kParts] = {};
  int64_t d = 0;
  for (; d + kParts <= D; d += kParts) {
    for (int64_t i = 0; i < kParts; ++i) {
      parts[i] += static_cast<double>(a[d + i]) * static_cast<double>(b[d + i]);
    }
  }
  for (; d < D; ++d) parts[d % kParts] += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  double total = 0;
  for (const double part : parts) total += part;
  return total;
}

template <typename T>
double inverse_norm(const T* x, int64_t D) {
  return 1 / std::sqrt(dot(x, x, D) + 1e-6);
}

}  // namespace

template <typename T>
void soft_logits(
    const T* x, const T* products, T* scaled, int64_t D, int64_t S, int64_t row_begin,
    int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T r = static_cast<T>(inverse_norm(x + row * D, D));
    for (int64_t i = row * S; i < (row + 1) * S; ++i) scaled[i] = r * products[i];
  }
}

template <typename T>
void soft_logits_backward(const T* x, T* grad, int64_t D, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T* token = x + row * D;
    T* out = grad + row * D;
    const double r = inverse_norm(token, D);
    const double along = r * (r * dot(token, out, D));
    for (int64_t d = 0; d < D; ++d) {
      out[d] = static_cast<T>(static_cast<double>(out[d]) - along * static_cast<double>(token[d]));
    }
  }
}

template void soft_logits(const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t);
template void soft_logits(
    const double*, const double*, double*, int64_t, int64_t, int64_t, int64_t);
template void soft_logits_backward(const float*, float*, int64_t, int64_t, int64_t);
template void soft_logits_backward(const double*, double*, int64_t, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
