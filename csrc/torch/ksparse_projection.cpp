#include "../ksparse_projection.h"

#include "tensor.h"

namespace vmoe {
namespace {

Tensor ksparse_projection(const Tensor& x_, int64_t k) {
  check_dim("ksparse_projection", "x", x_, 2);
  const int64_t N = x_.size(0), n = x_.size(1);
  STD_TORCH_CHECK(k >= 1 && k <= n, "ksparse_projection: k = ", k, " of an axis of ", n);
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

}  // namespace

VMOE_REGISTER(m) { m.impl("ksparse_projection", TORCH_BOX(&ksparse_projection)); }

}  // namespace vmoe
