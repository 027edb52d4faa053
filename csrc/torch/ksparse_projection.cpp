#include "../ksparse_projection.h"

#include "tensor.h"

namespace vmoe {
namespace {

Tensor ksparse_projection(const Tensor& x_, int64_t k) {
  check_dim("ksparse_projection", "x", x_, 2);
  const int64_t N = x_.size(0), n = x_.size(1);
  STD_TORCH_CHECK(
      k >= 1 && k <= n, "ksparse_projection: k = ", k, ", wanted 1 to the length of the axis, ", n);
  const Tensor x = packed(x_);
  Tensor out = empty({N, n}, x);
  by_dtype("ksparse_projection", x, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("ksparse_projection", x, {}, [&](auto stream) {
      cuda::ksparse_projection(read<T>(x), write<T>(out), n, k, N, stream);
    });
#else
    parallel(N, n, [&](int64_t begin, int64_t end) {
      cpu::ksparse_projection(read<T>(x), write<T>(out), n, k, begin, end);
    });
#endif
  });
  return out;
}

Tensor ksparse_projection_backward(const Tensor& grad_, const Tensor& out_) {
  check_dim("ksparse_projection_backward", "out", out_, 3);
  const int64_t A = out_.size(0), n = out_.size(1), B = out_.size(2);
  check_shape("ksparse_projection_backward", "grad", grad_, {A, n, B});
  check_dtype("ksparse_projection_backward", "grad", grad_, out_.scalar_type());
  const Tensor grad = packed(grad_), out = packed(out_);
  Tensor grad_x = empty({A, n, B}, out);
  if (grad_x.numel() == 0) return grad_x;
  by_dtype("ksparse_projection_backward", out, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("ksparse_projection_backward", out, {grad}, [&](auto stream) {
      cuda::ksparse_projection_backward(
          read<T>(grad), read<T>(out), write<T>(grad_x), A, n, B, stream);
    });
#else
    parallel(A, n * B, [&](int64_t begin, int64_t end) {
      cpu::ksparse_projection_backward(
          read<T>(grad), read<T>(out), write<T>(grad_x), n, B, begin, end);
    });
#endif
  });
  return grad_x;
}

}  // namespace

VMOE_REGISTER(m) {
  m.impl("ksparse_projection", TORCH_BOX(&ksparse_projection));
  m.impl("ksparse_projection_backward", TORCH_BOX(&ksparse_projection_backward));
}

}  // namespace vmoe
