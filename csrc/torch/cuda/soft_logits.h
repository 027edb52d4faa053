// soft_logits on CUDA -- products by torch over the tokens of all groups (the forward has one, the
// backward two), and our kernels before and after the products.
#pragma once

#include "../../common/row_stride.h"
#include "../soft_logits.h"
#include "product.h"

namespace vmoe {
namespace {

using torch::stable::flatten;
using torch::stable::narrow;
using torch::stable::transpose;

void run_forward(const SoftLogits& product, const Tensor& logits) {
  const int64_t rows = product.G * product.tokens, D = product.D, S = product.S;
  const Tensor &x = product.x, &phi = product.phi;
  by_row_dtype("soft_logits", x, [&](auto zero) {
    using Row = decltype(zero);
    using T = Compute<Row>;
    on_device("soft_logits", x, {phi}, [&](auto stream) {
      const int64_t stride = row_stride<Row>(S);
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
}

// Writes the gradient of x to grad_x and returns the gradient of phi.
Tensor run_backward(const SoftLogits& product, const Tensor& grad, const Tensor& grad_x) {
  const int64_t rows = product.G * product.tokens, D = product.D, S = product.S;
  const Tensor &x = product.x, &phi = product.phi;
  const Tensor grad_phi = empty({D, S}, phi);
  by_row_dtype("soft_logits_backward", x, [&](auto zero) {
    using Row = decltype(zero);
    using T = Compute<Row>;
    on_device("soft_logits_backward", x, {grad, phi}, [&](auto stream) {
      const int64_t stride = row_stride<Row>(S);
      Tensor scaled = empty({rows, stride}, x), factor = phi;
      cuda::soft_logits_scaled(read<Row>(x), read<T>(grad), write<Row>(scaled), D, S, rows, stream);
      if constexpr (kHalf<Row>) {
        Tensor parts = empty({D, 2 * stride}, x);
        cuda::soft_logits_parts(read<T>(phi), write<Row>(parts), D, S, stream);
        factor = narrow(parts, 1, 0, S);  // the high part of phi
      }
      scaled = narrow(scaled, 1, 0, S);
      multiply(grad_phi, transpose(flatten(x, 0, 1), 0, 1), scaled);
      multiply(flatten(grad_x, 0, 1), scaled, transpose(factor, 0, 1));
      cuda::soft_logits_backward(read<Row>(x), write<Row>(grad_x), D, rows, stream);
    });
  });
  return grad_phi;
}

}  // namespace
}  // namespace vmoe
