// product on CUDA -- torch's matrix products, cuBLAS, on the current device and torch's stream
// there.
//
// They follow torch's settings (TF32, sums of 16-bit products). Autocast does not touch them: the
// shims do not go through the dispatcher, and it does not know the products that choose their
// dtype.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "../tensor.h"

namespace vmoe {

// out = a b, of matrices or of as many matrices. Of factors in 16 bits out may be float32: the
// sums.
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
