// product on CUDA -- torch's matrix products (cuBLAS), on the current device and its current
// stream.
//
// The products obey the settings of torch (TF32, reduced-precision sums of 16-bit products). The
// products ignore autocast: aoti_torch_cuda_mm_out and bmm_out do not go through the dispatcher,
// and autocast has no rule for the overload dtype_out.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "../tensor.h"

namespace vmoe {

// out = a b, for matrices or for batches of matrices. If a and b have 16 bits, `out` may be
// float32: the sums of the products are then not rounded to 16 bits.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  const bool matrices = out.dim() == 2;
  if (out.scalar_type() == a.scalar_type()) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        matrices ? aoti_torch_cuda_mm_out(out.get(), a.get(), b.get())
                 : aoti_torch_cuda_bmm_out(out.get(), a.get(), b.get()));
    return;
  }
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(
      matrices ? "aten::mm" : "aten::bmm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  // The call returns another reference to out, which is released here.
  (void)torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace vmoe
