#include "../ksparse_projection.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../topk.h"
#include "simd.h"

namespace vmoe::cpu::VMOE_ISA {
namespace {

// Returns tau - values[0], where tau is the threshold of the simplex projection of the descending
// `values`. Differences from values[0] avoid cancellation if all values are large. The result is
// computed in float64. The result is NaN if values[0] is not finite.
template <typename T>
double simplex_threshold(const T* values, int64_t k) {
  const double largest = values[0];
  double sum = 0, tau = 0;
  for (int64_t r = 0; r < k; ++r) {
    const double u = values[r] - largest;
    sum += u;
    // The support is the longest prefix for which this condition is false. The condition is written
    // so that NaN makes tau NaN instead of ending the loop.
    if (r > 0 && 1 + static_cast<double>(r + 1) * u <= sum) break;
    tau = (sum - 1) / static_cast<double>(r + 1);
  }
  return tau;
}

}  // namespace

template <typename T>
void ksparse_projection(
    const T* x, T* out, int64_t n, int64_t k, int64_t row_begin, int64_t row_end) {
  // Rows per call of topk, which computes several short rows at the same time.
  constexpr int64_t kRows = 64;
  std::fill(out + row_begin * n, out + row_end * n, T{0});
  if (k == 0 || row_begin >= row_end) return;
  const int64_t together = std::min(kRows, row_end - row_begin);
  std::vector<T> values(together * k);
  std::vector<int32_t> indices(together * k);
  for (int64_t first = row_begin; first < row_end; first += together) {
    const int64_t rows = std::min(together, row_end - first);
    topk(x + first * n, values.data(), indices.data(), n, 1, k, 0, rows);
    for (int64_t row = 0; row < rows; ++row) {
      const T* value = values.data() + row * k;
      const int32_t* index = indices.data() + row * k;
      T* p = out + (first + row) * n;
      const double tau = simplex_threshold(value, k), largest = value[0];
      if (std::isnan(tau)) std::fill(p, p + n, std::numeric_limits<T>::quiet_NaN());
      for (int64_t j = 0; j < k; ++j) {
        const double share = value[j] - largest - tau;
        if (!(share > 0)) break;  // shares descend, so no later share is positive
        p[index[j]] = static_cast<T>(share);
      }
    }
  }
}

namespace {

// Writes the gradient of the first `columns` adjacent columns, at most one vector of them. On the
// support of a column, the gradient is `grad` minus the mean of `grad` over the support. Elsewhere
// the gradient is 0. Rows are `stride` entries apart.
template <typename T>
void centre_columns(
    const T* grad, const T* out, T* grad_x, int64_t n, int64_t stride, int64_t columns) {
  Vec<T> total{}, count{};
  for (int64_t i = 0; i < n; ++i) {
    const Mask<T> inside = get(out + i * stride, columns, T{0}) != T{0};
    total += inside ? get(grad + i * stride, columns, T{0}) : Vec<T>{};
    count += inside ? splat(T{1}) : Vec<T>{};
  }
  const Vec<T> mean = total / max<T>(count, splat(T{1}));
  for (int64_t i = 0; i < n; ++i) {
    const Mask<T> inside = get(out + i * stride, columns, T{0}) != T{0};
    const Vec<T> centred = get(grad + i * stride, columns, T{0}) - mean;
    put(grad_x + i * stride, inside ? centred : Vec<T>{}, columns);
  }
}

template <typename T>
void centre_row(const T* grad, const T* out, T* grad_x, int64_t n) {
  Vec<T> total{}, count{};
  for (int64_t i = 0; i < n; i += kWidth<T>) {
    const Mask<T> inside = get(out + i, n - i, T{0}) != T{0};
    total += inside ? get(grad + i, n - i, T{0}) : Vec<T>{};
    count += inside ? splat(T{1}) : Vec<T>{};
  }
  const Vec<T> mean = splat(sum<T>(total) / std::max(sum<T>(count), T{1}));
  for (int64_t i = 0; i < n; i += kWidth<T>) {
    const Mask<T> inside = get(out + i, n - i, T{0}) != T{0};
    put(grad_x + i, inside ? get(grad + i, n - i, T{0}) - mean : Vec<T>{}, n - i);
  }
}

}  // namespace

template <typename T>
void ksparse_projection_backward(
    const T* grad, const T* out, T* grad_x, int64_t n, int64_t B, int64_t begin, int64_t end) {
  for (int64_t a = begin; a < end; ++a) {
    const int64_t at = a * n * B;
    if (B == 1) centre_row(grad + at, out + at, grad_x + at, n);
    for (int64_t b = 0; B > 1 && b < B; b += kWidth<T>) {
      centre_columns(grad + at + b, out + at + b, grad_x + at + b, n, B, B - b);
    }
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void ksparse_projection(const T*, T*, int64_t, int64_t, int64_t, int64_t);              \
  template void ksparse_projection_backward(                                                       \
      const T*, const T*, T*, int64_t, int64_t, int64_t, int64_t);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
