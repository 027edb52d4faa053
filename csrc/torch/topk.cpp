#include "../topk.h"

#include "tensor.h"

namespace vmoe {
namespace {

std::tuple<Tensor, Tensor> topk(const Tensor& x_, int64_t k, int64_t dim) {
  const int64_t axes = x_.dim();
  STD_TORCH_CHECK(
      dim >= 0 && dim < axes, "topk: dim = ", dim, ", wanted at least 0 and less than ", axes,
      ", the number of axes");
  const int64_t n = x_.size(dim);
  STD_TORCH_CHECK(k >= 0 && k <= n, "topk: k = ", k, ", wanted 0 to the length of the axis, ", n);
  STD_TORCH_CHECK(n <= INT32_MAX, "topk: an axis of ", n, " entries does not fit int32 indices");
  const Tensor x = packed(x_);
  int64_t N = 1, M = 1;
  std::vector<int64_t> shape;
  for (int64_t axis = 0; axis < axes; ++axis) {
    if (axis == dim) continue;
    (axis < dim ? N : M) *= x.size(axis);
    shape.push_back(x.size(axis));
  }
  shape.push_back(k);
  Tensor values = torch::stable::new_empty(x, shape);
  Tensor indices = torch::stable::new_empty(x, shape, ScalarType::Int);
  by_dtype("topk", x, [&](auto zero) {
    using T = decltype(zero);
#ifdef VMOE_DEVICE_CUDA
    on_device("topk", x, {}, [&](auto stream) {
      const Tensor scratch = workspace(x, cuda::topk_workspace<T>(n, M, k, N * M));
      cuda::topk(
          read<T>(x), write<T>(values), write<int32_t>(indices), n, M, k, N * M,
          write<void>(scratch), stream);
    });
#else
    parallel(N * M, n, [&](int64_t begin, int64_t end) {
      cpu::topk(read<T>(x), write<T>(values), write<int32_t>(indices), n, M, k, begin, end);
    });
#endif
  });
  return {values, indices};
}

}  // namespace

VMOE_REGISTER(m) { m.impl("topk", TORCH_BOX(&topk)); }

}  // namespace vmoe
