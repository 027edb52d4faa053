#include "../soft_logits.h"

#include "product.h"

namespace vmoe {
namespace {

using torch::stable::sum;
using torch::stable::transpose;

void check(const char* op, const Tensor& x, const Tensor& phi) {
  check_dim(op, "x", x, 3);
  check_dim(op, "phi", phi, 2);
  check_shape(op, "phi", phi, {x.size(2), phi.size(1)});
  check_dtype(op, "phi", phi, x.scalar_type());
}

Tensor soft_logits(const Tensor& x_in, const Tensor& phi_in) {
  check("soft_logits", x_in, phi_in);
  const Tensor x = packed(x_in), phi = packed(phi_in);
  const int64_t G = x.size(0), tokens = x.size(1), D = x.size(2), S = phi.size(1);
  Tensor logits = empty({G, tokens, S}, x);
  by_dtype("soft_logits", x, [&](auto zero) {
    using T = decltype(zero);
    parallel_products(G, tokens * S, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const T* tokens_g = read<T>(x) + g * tokens * D;
        T* out = write<T>(logits) + g * tokens * S;
        multiply(matrix(out, tokens, S), matrix(tokens_g, tokens, D), phi);
        cpu::soft_logits(tokens_g, out, out, D, S, 0, tokens);
      }
    });
  });
  return logits;
}

// Phi's gradient is a sum over groups: in kParts runs of groups whatever the number of
// threads, each with a sum of its own, added in order.
std::tuple<Tensor, Tensor> soft_logits_backward(
    const Tensor& grad_in, const Tensor& x_in, const Tensor& phi_in) {
  constexpr int64_t kParts = 16;
  check("soft_logits_backward", x_in, phi_in);
  const Tensor x = packed(x_in), phi = transpose(packed(phi_in), 0, 1), grad = packed(grad_in);
  const int64_t G = x.size(0), tokens = x.size(1), D = x.size(2), S = phi.size(0);
  check_shape("soft_logits_backward", "grad", grad, {G, tokens, S});
  check_dtype("soft_logits_backward", "grad", grad, x.scalar_type());
  const int64_t parts = std::clamp<int64_t>(G, 1, kParts);
  Tensor grad_x = empty({G, tokens, D}, x), totals = empty({parts, D, S}, x);
  by_dtype("soft_logits_backward", x, [&](auto zero) {
    using T = decltype(zero);
    parallel_products(parts, tokens * S, [&](int64_t begin, int64_t end) {
      const auto scaled = scratch<T>(tokens * S);
      for (int64_t part = begin; part < end; ++part) {
        T* total = write<T>(totals) + part * D * S;
        std::fill(total, total + D * S, T{0});
        for (int64_t g = G * part / parts; g < G * (part + 1) / parts; ++g) {
          const T* tokens_g = read<T>(x) + g * tokens * D;
          T* out = write<T>(grad_x) + g * tokens * D;
          cpu::soft_logits(tokens_g, read<T>(grad) + g * tokens * S, scaled.get(), D, S, 0, tokens);
          const Tensor products = matrix(scaled.get(), tokens, S);
          multiply_add(matrix(total, D, S), transposed(tokens_g, tokens, D), products);
          multiply(matrix(out, tokens, D), products, phi);
          cpu::soft_logits_backward(tokens_g, out, D, 0, tokens);
        }
      }
    });
  });
  return {grad_x, sum(totals, 0)};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("soft_logits", TORCH_BOX(&soft_logits));
  m.impl("soft_logits_backward", TORCH_BOX(&soft_logits_backward));
}

}  // namespace vmoe
