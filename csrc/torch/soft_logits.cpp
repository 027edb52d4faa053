#include "soft_logits.h"

#ifdef VMOE_DEVICE_CUDA
#include "cuda/soft_logits.h"
#else
#include "cpu/soft_logits.h"
#endif

namespace vmoe {
namespace {

SoftLogits checked(const char* op, const Tensor& x, const Tensor& phi) {
  check_dim(op, "x", x, 3);
  check_dim(op, "phi", phi, 2);
  check_shape(op, "phi", phi, {x.size(2), phi.size(1)});
  check_dtype(op, "phi", phi, compute_dtype(x));
  return {x.size(0), x.size(1), x.size(2), phi.size(1), packed(x), packed(phi)};
}

Tensor soft_logits(const Tensor& x, const Tensor& phi) {
  const SoftLogits product = checked("soft_logits", x, phi);
  const Tensor logits = empty({product.G, product.tokens, product.S}, phi);
  run_forward(product, logits);
  return logits;
}

std::tuple<Tensor, Tensor> soft_logits_backward(
    const Tensor& grad, const Tensor& x, const Tensor& phi) {
  const char* op = "soft_logits_backward";
  const SoftLogits product = checked(op, x, phi);
  check_shape(op, "grad", grad, {product.G, product.tokens, product.S});
  check_dtype(op, "grad", grad, phi.scalar_type());
  const Tensor grad_x = empty({product.G, product.tokens, product.D}, x);
  return {grad_x, run_backward(product, packed(grad), grad_x)};
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("soft_logits", TORCH_BOX(&soft_logits));
  m.impl("soft_logits_backward", TORCH_BOX(&soft_logits_backward));
}

}  // namespace vmoe
