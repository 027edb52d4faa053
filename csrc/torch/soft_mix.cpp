#include "soft_mix.h"

#ifdef VMOE_DEVICE_CUDA
#include "cuda/soft_mix.h"
#else
#include "cpu/soft_mix.h"
#endif

namespace vmoe {
namespace {

SoftMix checked(
    const char* op, const Tensor& logits, const Tensor& values, int64_t dim, int64_t num_experts) {
  check_dim(op, "logits", logits, 3);
  STD_TORCH_CHECK(dim == 1 || dim == 2, op, ": dim = ", dim, ", wanted 1 or 2");
  const int64_t G = logits.size(0), tokens = logits.size(1), S = logits.size(2), E = num_experts;
  STD_TORCH_CHECK(
      E >= 1 && S % E == 0, op, ": logits has ", S,
      " slots, wanted a multiple of num_experts = ", E);
  check_dim(op, "values", values, dim == 1 ? 3 : 4);
  const int64_t C = S / E, D = values.size(dim == 1 ? 2 : 3);
  if (dim == 1) {
    check_shape(op, "values", values, {G, tokens, D});
  } else {
    check_shape(op, "values", values, {E, G, C, D});
  }
  check_dtype(op, "logits", logits, compute_dtype(values));
  return {G, tokens, E, C, D, dim == 1, packed(logits), packed(values)};
}

Tensor soft_mix(const Tensor& logits, const Tensor& values, int64_t dim, int64_t num_experts) {
  const SoftMix mix = checked("soft_mix", logits, values, dim, num_experts);
  const Tensor out = mix.over_tokens ? empty({mix.E, mix.G, mix.C, mix.D}, values)
                                     : empty({mix.G, mix.tokens, mix.D}, values);
  run_forward(mix, out);
  return out;
}

// The backward takes logits and values, which the caller keeps anyway. It recomputes the weights.
// Recomputing the logits, too, would save the memory of [G, T, S] numbers. But it would take
// another product of T * S * D multiply-adds per group.
std::tuple<Tensor, Tensor> soft_mix_backward(
    const Tensor& grad, const Tensor& logits, const Tensor& values, int64_t dim,
    int64_t num_experts) {
  const char* op = "soft_mix_backward";
  const SoftMix mix = checked(op, logits, values, dim, num_experts);
  if (mix.over_tokens) {
    check_shape(op, "grad", grad, {mix.E, mix.G, mix.C, mix.D});
  } else {
    check_shape(op, "grad", grad, {mix.G, mix.tokens, mix.D});
  }
  check_dtype(op, "grad", grad, values.scalar_type());
  const Tensor grad_logits = empty({mix.G, mix.tokens, mix.S()}, logits);
  const Tensor grad_values = mix.over_tokens ? empty({mix.G, mix.tokens, mix.D}, values)
                                             : empty({mix.E, mix.G, mix.C, mix.D}, values);
  run_backward(mix, packed(grad), grad_logits, grad_values);
  return {grad_logits, grad_values};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("soft_mix", TORCH_BOX(&soft_mix));
  m.impl("soft_mix_backward", TORCH_BOX(&soft_mix_backward));
}

}  // namespace vmoe
