// soft_logits on a CPU -- groups in parallel. A thread computes the product of some groups, and
// scales its rows while they are in cache.
#pragma once

#include "../../cpu/buffer.h"
#include "../soft_logits.h"
#include "product.h"

namespace vmoe {
namespace {

void run_forward(const SoftLogits& product, const Tensor& logits) {
  const int64_t tokens = product.tokens, D = product.D, S = product.S;
  by_dtype("soft_logits", product.x, [&](auto zero) {
    using T = decltype(zero);
    parallel_runs(product.G, tokens * (D + S), [&](int64_t first, int64_t count) {
      const int64_t rows = count * tokens;
      const T* in = read<T>(product.x) + first * tokens * D;
      T* out = write<T>(logits) + first * tokens * S;
      multiply<T>(matrix(out, rows, S), matrix(in, rows, D), matrix(read<T>(product.phi), D, S));
      cpu::soft_logits(in, out, out, D, S, 0, rows);
    });
  });
}

// Writes the gradient of x to grad_x and returns the gradient of phi, which is a sum over groups.
// The groups are divided into up to kParts parts. Each part has its own total, and the totals are
// added in order. The number of parts does not depend on the number of threads, so the result does
// not depend on it either.
Tensor run_backward(const SoftLogits& product, const Tensor& grad, const Tensor& grad_x) {
  const int64_t G = product.G, tokens = product.tokens, D = product.D, S = product.S;
  constexpr int64_t kParts = 16;
  const int64_t together = groups_together(2 * tokens * (D + S));
  const int64_t parts = std::clamp<int64_t>(G / together, 1, kParts);
  const Tensor totals = empty({parts, D, S}, product.x);
  by_dtype("soft_logits_backward", product.x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const cpu::Buffer<T> scaled(std::min(together, G) * tokens * S);
      for (int64_t part = begin; part < end; ++part) {
        T* total = write<T>(totals) + part * D * S;
        std::fill(total, total + D * S, T{0});
        const int64_t last = G * (part + 1) / parts;
        for (int64_t first = G * part / parts; first < last; first += together) {
          const int64_t rows = std::min(together, last - first) * tokens;
          const T* in = read<T>(product.x) + first * tokens * D;
          T* out = write<T>(grad_x) + first * tokens * D;
          cpu::soft_logits(in, read<T>(grad) + first * tokens * S, scaled.get(), D, S, 0, rows);
          const Matrix<const T> scaled_rows = matrix(scaled.get(), rows, S);
          multiply_add<T>(matrix(total, D, S), transposed(in, rows, D), scaled_rows);
          multiply<T>(matrix(out, rows, D), scaled_rows, transposed(read<T>(product.phi), D, S));
          cpu::soft_logits_backward(in, out, D, 0, rows);
        }
      }
    });
  });
  const std::vector<int64_t> axes{0};  // named, because sum() keeps a reference to `axes`
  return torch::stable::sum(totals, axes);
}

}  // namespace
}  // namespace vmoe
