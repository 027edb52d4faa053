// product -- matrix products, for both devices, and what a CPU needs around them for loops over groups.
//
// On a CPU they are ours (../cpu/product.h): each runs on the one thread that calls it, and what it makes
// stays in that thread's cache for the next step. On CUDA they are torch's, cuBLAS, on the current
// device and torch's stream there, and follow torch's settings (TF32, sums of 16-bit products).
// Autocast does not touch them: the shims do not go through the dispatcher, and it does not know the
// products that choose their dtype.
#pragma once

#include "tensor.h"

#ifdef VMOE_DEVICE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#else
#include <memory>
#include <new>

#include "../cpu/product.h"
#endif

namespace vmoe {

#ifdef VMOE_DEVICE_CUDA
// out = a b, of matrices or of as many matrices. Of factors in 16 bits out may be float32: the sums.
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
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // out once more, to be let go
}
#else
struct FreeLines {
  void operator()(void* memory) const { operator delete[](memory, std::align_val_t{64}); }
};

// Memory for one thread's intermediate results, not initialised. It begins a cache line.
template <typename T>
std::unique_ptr<T[], FreeLines> scratch(int64_t size) {
  return std::unique_ptr<T[], FreeLines>(new (std::align_val_t{64}) T[size]);
}

// How many groups a thread takes at a time: small ones together, so that the calls do not
// outweigh the work, as far as their elements stay in its cache.
inline int64_t groups_together(int64_t elements_each) {
  return std::max<int64_t>(1, (1 << 17) / std::max<int64_t>(1, elements_each));
}

// body(first, count) for every such run of groups. The runs are the same whatever the
// number of threads.
template <typename Body>
void parallel_runs(int64_t groups, int64_t elements_each, Body&& body) {
  const int64_t together = groups_together(elements_each);
  torch::stable::parallel_for(
      0, (groups + together - 1) / together, 1, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) {
          const int64_t first = run * together;
          body(first, std::min(together, groups - first));
        }
      });
}
#endif

}  // namespace vmoe
