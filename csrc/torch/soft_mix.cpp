#include "../soft_mix.h"

#include "tensor.h"

namespace vmoe {
namespace {

using torch::stable::matmul;
using torch::stable::transpose;

Tensor soft_mix_weights(const Tensor& logits, bool over_tokens) {
  const int64_t G = logits.size(0), tokens = logits.size(1), S = logits.size(2);
  Tensor weights = empty({G, tokens, S}, logits);
  by_dtype("soft_mix", logits, [&](auto zero) {
    using T = decltype(zero);
    parallel(G, 4 * tokens * S, [&](int64_t begin, int64_t end) {
      cpu::soft_mix(read<T>(logits), write<T>(weights), tokens, S, over_tokens, begin, end);
    });
  });
  return weights;
}

void check(const char* op, const Tensor& logits, const Tensor& values, int64_t dim) {
  check_dim(op, "logits", logits, 3);
  check_dim(op, "values", values, 3);
  STD_TORCH_CHECK(dim == 1 || dim == 2, op, ": dim = ", dim);
  check_shape(op, "values", values, {logits.size(0), logits.size(dim), values.size(2)});
  check_dtype(op, "values", values, logits.scalar_type());
}

Tensor soft_mix(const Tensor& logits, const Tensor& values, int64_t dim) {
  check("soft_mix", logits, values, dim);
  const Tensor weights = soft_mix_weights(packed(logits), dim == 1);
  return matmul(dim == 1 ? transpose(weights, 1, 2) : weights, values);
}

// The weights are made again instead of kept: backward holds logits and values,
// which the caller has anyway.
std::tuple<Tensor, Tensor> soft_mix_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& values, int64_t dim) {
  check("soft_mix_backward", logits, values, dim);
  const int64_t G = logits.size(0), tokens = logits.size(1), S = logits.size(2);
  check_shape("soft_mix_backward", "grad", grad, {G, logits.size(3 - dim), values.size(2)});
  check_dtype("soft_mix_backward", "grad", grad, logits.scalar_type());
  const Tensor weights = soft_mix_weights(packed(logits), dim == 1);
  Tensor grad_values = matmul(dim == 1 ? weights : transpose(weights, 1, 2), grad);
  Tensor grad_logits = dim == 1 ? packed(matmul(values, transpose(grad, 1, 2)))
                                : packed(matmul(grad, transpose(values, 1, 2)));
  by_dtype("soft_mix_backward", logits, [&](auto zero) {
    using T = decltype(zero);
    parallel(G, 2 * tokens * S, [&](int64_t begin, int64_t end) {
      cpu::soft_mix_backward(
          read<T>(weights), write<T>(grad_logits), tokens, S, dim == 1, begin, end);
    });
  });
  return {grad_logits, grad_values};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("soft_mix", TORCH_BOX(&soft_mix));
  m.impl("soft_mix_backward", TORCH_BOX(&soft_mix_backward));
}

}  // namespace vmoe
