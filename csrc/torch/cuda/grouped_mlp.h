// grouped_mlp on CUDA -- batched products by torch over all rows, including rows that are not
// filled. docs/cuda.md compares these products with grouped products over the filled rows alone.
#pragma once

#include "../grouped_mlp.h"
#include "product.h"

namespace vmoe {
namespace {

using torch::stable::transpose;

cuda::ExpertRows rows_of(const ExpertMlps& mlp) {
  return {read_or_null<int32_t>(mlp.filled), mlp.E, mlp.N, mlp.G};
}

// If `hidden` has no rows, x w1 is not kept: the activations overwrite it.
void run_forward(
    const ExpertMlps& mlp, const std::optional<Tensor>& b2, const Tensor& y, const Tensor& hidden) {
  const Tensor& x = mlp.x;
  const Tensor act = empty({mlp.E, mlp.N, mlp.F}, x);
  const Tensor& product = hidden.size(1) > 0 ? hidden : act;
  const cuda::ExpertRows rows = rows_of(mlp);
  by_row_dtype("grouped_mlp", x, [&](auto zero) {
    using Row = decltype(zero);
    const std::initializer_list<Tensor> others{
        mlp.w1, mlp.b1.value_or(x), mlp.w2, b2.value_or(x), mlp.filled.value_or(x)};
    on_device("grouped_mlp", x, others, [&](auto stream) {
      multiply(product, x, mlp.w1);
      cuda::bias_gelu(
          read<Row>(product), read_or_null<Row>(mlp.b1), write<Row>(act), rows, mlp.F, mlp.tanh,
          stream);
      multiply(y, act, mlp.w2);
      cuda::add_bias(write<Row>(y), read_or_null<Row>(b2), rows, mlp.out, stream);
    });
  });
}

// If `hidden` has no rows, x w1 is computed again.
void run_backward(
    const ExpertMlps& mlp, const Tensor& grad, const Tensor& hidden, const ExpertMlpGradients& to) {
  const Tensor& x = mlp.x;
  const bool saved = hidden.size(1) > 0;
  const Tensor grad_act = empty({mlp.E, mlp.N, mlp.F}, x);
  const Tensor product = saved ? hidden : empty({mlp.E, mlp.N, mlp.F}, x);
  const Tensor act = saved && to.of_weights ? empty({mlp.E, mlp.N, mlp.F}, x) : product;
  const cuda::ExpertRows rows = rows_of(mlp);
  by_row_dtype("grouped_mlp_backward", x, [&](auto zero) {
    using Row = decltype(zero);
    const std::initializer_list<Tensor> others{
        grad, mlp.w1, mlp.b1.value_or(x), mlp.w2, mlp.filled.value_or(x), hidden};
    on_device("grouped_mlp_backward", x, others, [&](auto stream) {
      Tensor grad_y = grad;
      if (to.of_weights) {
        // The gradient of rows that are not filled may be infinite. Infinities must not reach the
        // gradient of w2, so sum_rows copies the gradient with zeros in these rows.
        if (mlp.filled) grad_y = empty({mlp.E, mlp.N, mlp.out}, x);
        const Tensor memory = workspace(x, cuda::sum_workspace<Row>(rows, mlp.out));
        cuda::sum_rows(
            read<Row>(grad), mlp.filled ? write<Row>(grad_y) : nullptr, write<Row>(to.b2),
            write<char>(memory), rows, mlp.out, stream);
      }
      if (!saved) multiply(product, x, mlp.w1);
      multiply(grad_act, grad_y, transpose(mlp.w2, 1, 2));
      const size_t bytes = to.of_weights ? cuda::sum_workspace<Row>(rows, mlp.F) : 0;
      const Tensor memory = workspace(x, bytes);
      cuda::bias_gelu_backward(
          read<Row>(product), read_or_null<Row>(mlp.b1), to.of_weights ? write<Row>(act) : nullptr,
          write<Row>(grad_act), to.of_weights ? write<Row>(to.b1) : nullptr, write<char>(memory),
          rows, mlp.F, mlp.tanh, stream);
      if (to.of_weights) {
        multiply(to.w1, transpose(x, 1, 2), grad_act);
        multiply(to.w2, transpose(act, 1, 2), grad_y);
      }
      if (to.of_x) multiply(to.x, grad_act, transpose(mlp.w1, 1, 2));
    });
  });
}

}  // namespace
}  // namespace vmoe
