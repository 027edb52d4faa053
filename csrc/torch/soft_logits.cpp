#include "../soft_logits.h"

#include "../common/row_stride.h"
#include "product.h"

namespace vmoe {
namespace {

using torch::stable::flatten;
using torch::stable::narrow;
using torch::stable::sum;
using torch::stable::transpose;

void check(const char* op, const Tensor& x, const Tensor& phi) {
  check_dim(op, "x", x, 3);
  check_dim(op, "phi", phi, 2);
  check_shape(op, "phi", phi, {x.size(2), phi.size(1)});
  check_dtype(op, "phi", phi, compute_dtype(x));
}

Tensor soft_logits(const Tensor& x_in, const Tensor& phi_in) {
  check("soft_logits", x_in, phi_in);
  const Tensor x = packed(x_in), phi = packed(phi_in);
  const int64_t G = x.size(0), tokens = x.size(1), D = x.size(2), S = phi.size(1);
  Tensor logits = empty({G, tokens, S}, phi);
#ifdef VMOE_DEVICE_CUDA
  by_row_dtype("soft_logits", x, [&](auto zero) {
    using Row = decltype(zero);
    using T = Compute<Row>;
    on_device("soft_logits", x, {phi}, [&](auto stream) {
      const int64_t rows = G * tokens, stride = row_stride<Row>(S);
      Tensor factor = phi, products = flatten(logits, 0, 1);
      if constexpr (kHalf<Row>) {
        factor = empty({D, 2 * stride}, x);
        products = empty({rows, 2 * stride}, phi);
        cuda::soft_logits_parts(read<T>(phi), write<Row>(factor), D, S, stream);
      }
      multiply(products, flatten(x, 0, 1), factor);
      cuda::soft_logits(read<Row>(x), read<T>(products), write<T>(logits), D, S, rows, stream);
    });
  });
#else
  by_dtype("soft_logits", x, [&](auto zero) {
    using T = decltype(zero);
    parallel_runs(G, tokens * (D + S), [&](int64_t first, int64_t count) {
      const int64_t rows = count * tokens;
      const T* in = read<T>(x) + first * tokens * D;
      T* out = write<T>(logits) + first * tokens * S;
      multiply<T>(matrix(out, rows, S), matrix(in, rows, D), matrix(read<T>(phi), D, S));
      cpu::soft_logits(in, out, out, D, S, 0, rows);
    });
  });
#endif
  return logits;
}

// Phi's gradient is a sum over groups: on a CPU in at most kParts parts whatever the number of
// threads, each with a total of its own, added in order. A part is worth a call or more.
std::tuple<Tensor, Tensor> soft_logits_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& phi_in) {
  check("soft_logits_backward", x_in, phi_in);
  const Tensor x = packed(x_in), phi = packed(phi_in), grad = packed(grad_in);
  const int64_t G = x.size(0), tokens = x.size(1), D = x.size(2), S = phi.size(1);
  check_shape("soft_logits_backward", "grad", grad, {G, tokens, S});
  check_dtype("soft_logits_backward", "grad", grad, phi.scalar_type());
  Tensor grad_x = empty({G, tokens, D}, x);
#ifdef VMOE_DEVICE_CUDA
  const Tensor grad_phi = empty({D, S}, phi);
  by_row_dtype("soft_logits_backward", x, [&](auto zero) {
    using Row = decltype(zero);
    using T = Compute<Row>;
    on_device("soft_logits_backward", x, {grad, phi}, [&](auto stream) {
      const int64_t rows = G * tokens, stride = row_stride<Row>(S);
      Tensor scaled = empty({rows, stride}, x), factor = phi;
      cuda::soft_logits_scaled(read<Row>(x), read<T>(grad), write<Row>(scaled), D, S, rows, stream);
      if constexpr (kHalf<Row>) {
        Tensor parts = empty({D, 2 * stride}, x);
        cuda::soft_logits_parts(read<T>(phi), write<Row>(parts), D, S, stream);
        factor = narrow(parts, 1, 0, S);  // the high one
      }
      scaled = narrow(scaled, 1, 0, S);
      multiply(grad_phi, transpose(flatten(x, 0, 1), 0, 1), scaled);
      multiply(flatten(grad_x, 0, 1), scaled, transpose(factor, 0, 1));
      cuda::soft_logits_backward(read<Row>(x), write<Row>(grad_x), D, rows, stream);
    });
  });
  return {grad_x, grad_phi};
#else
  constexpr int64_t kParts = 16;
  const int64_t together = groups_together(2 * tokens * (D + S));
  const int64_t parts = std::clamp<int64_t>(G / together, 1, kParts);
  Tensor totals = empty({parts, D, S}, x);
  by_dtype("soft_logits_backward", x, [&](auto zero) {
    using T = decltype(zero);
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
      const auto scaled = scratch<T>(std::min(together, G) * tokens * S);
      for (int64_t part = begin; part < end; ++part) {
        T* total = write<T>(totals) + part * D * S;
        std::fill(total, total + D * S, T{0});
        const int64_t last = G * (part + 1) / parts;
        for (int64_t first = G * part / parts; first < last; first += together) {
          const int64_t rows = std::min(together, last - first) * tokens;
          const T* in = read<T>(x) + first * tokens * D;
          T* out = write<T>(grad_x) + first * tokens * D;
          cpu::soft_logits(in, read<T>(grad) + first * tokens * S, scaled.get(), D, S, 0, rows);
          const Matrix<const T> products = matrix(scaled.get(), rows, S);
          multiply_add<T>(matrix(total, D, S), transposed(in, rows, D), products);
          multiply<T>(matrix(out, rows, D), products, transposed(read<T>(phi), D, S));
          cpu::soft_logits_backward(in, out, D, 0, rows);
        }
      }
    });
  });
  const std::vector<int64_t> axes{0};  // outlives the call, which keeps a reference
  return {grad_x, sum(totals, axes)};
#endif
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("soft_logits", TORCH_BOX(&soft_logits));
  m.impl("soft_logits_backward", TORCH_BOX(&soft_logits_backward));
}

}  // namespace vmoe
