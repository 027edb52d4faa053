// torch_cuda -- emulates the CUDA functions of torch that the bindings of csrc/torch call. This
// header is included before all other headers. It makes the bindings register the CUDA kernels for
// CPU tensors. The kernels then run on the emulator.
//
// Matrix products are torch's CPU products. Streams, the current device, the CUDA allocator and the
// asynchronous execution of kernels are not modelled.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int64_t) {}
};
}  // namespace torch::stable::accelerator

namespace shim {
namespace {

inline AOTITorchError no_stream(int32_t, void** stream) {
  return *stream = nullptr, AOTI_TORCH_SUCCESS;
}

// On a CPU, torch has no product with another dtype than its factors. For such a product this
// function first converts the factors to the dtype of the result.
inline AOTITorchError call_dispatcher(
    const char* op, const char* overload, StableIValue* stack, uint64_t version) {
  using torch::stable::Tensor;
  using torch::stable::detail::from, torch::stable::detail::to;
  if (std::string(overload) != "dtype_out") {
    return torch_call_dispatcher(op, overload, stack, version);
  }
  const auto a = to<Tensor>(stack[0]), b = to<Tensor>(stack[1]), out = to<Tensor>(stack[3]);
  const auto multiply = out.dim() == 2 ? aoti_torch_cpu_mm_out : aoti_torch_cpu_bmm_out;
  const auto wide = [&](const Tensor& x) { return torch::stable::to(x, out.scalar_type()); };
  const Tensor wide_a = wide(a), wide_b = wide(b);
  stack[0] = from(out);
  return multiply(out.get(), wide_a.get(), wide_b.get());
}

}  // namespace
}  // namespace shim

#define CUDA CPU
#define is_cuda is_cpu
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream shim::no_stream
#define aoti_torch_cuda_mm_out aoti_torch_cpu_mm_out
#define aoti_torch_cuda_bmm_out aoti_torch_cpu_bmm_out
#define torch_call_dispatcher shim::call_dispatcher
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)
