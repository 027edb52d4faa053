// product -- torch's matrix products, for both devices; for the CPU on pieces of packed memory, for
// loops over groups.
//
// Inside parallel_runs() each product runs on the one thread that calls it, and what it
// makes stays in that thread's cache for the next step. On CUDA the products are cuBLAS's, on the
// current device and torch's stream there, and follow torch's settings (TF32). The shims do not go
// through the dispatcher: autocast does not touch them.
#pragma once

#ifdef VMOE_DEVICE_CUDA
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define VMOE_SHIM(name) aoti_torch_cuda_##name
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define VMOE_SHIM(name) aoti_torch_cpu_##name
#endif

#include <memory>
#include <new>
#include <type_traits>

#include "tensor.h"

namespace vmoe {

// out = a b, of matrices or of as many matrices.
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      out.dim() == 2 ? VMOE_SHIM(mm_out)(out.get(), a.get(), b.get())
                     : VMOE_SHIM(bmm_out)(out.get(), a.get(), b.get()));
}
#undef VMOE_SHIM

#ifndef VMOE_DEVICE_CUDA
// Strided memory that stays the caller's.
template <typename T>
Tensor view(
    const T* data, std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides) {
  constexpr auto dtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(
      const_cast<T*>(data), {sizes.begin(), sizes.size()}, {strides.begin(), strides.size()}, cpu,
      dtype);
}

// [rows, columns], rows `stride` apart, and its transpose [columns, rows].
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t columns, int64_t stride) {
  return view(data, {rows, columns}, {stride, 1});
}
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return matrix(data, rows, columns, columns);
}
template <typename T>
Tensor transposed(const T* data, int64_t rows, int64_t columns, int64_t stride) {
  return view(data, {columns, rows}, {1, stride});
}
template <typename T>
Tensor transposed(const T* data, int64_t rows, int64_t columns) {
  return transposed(data, rows, columns, columns);
}

// `count` packed ones.
template <typename T>
Tensor matrices(const T* data, int64_t count, int64_t rows, int64_t columns) {
  return view(data, {count, rows, columns}, {rows * columns, columns, 1});
}
template <typename T>
Tensor transposed_matrices(const T* data, int64_t count, int64_t rows, int64_t columns) {
  return view(data, {count, columns, rows}, {rows * columns, 1, columns});
}

// out += a b, of matrices; the first of several sums only writes.
inline void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b, bool first = false) {
  if (first) return multiply(out, a, b);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
}

struct FreeLines {
  void operator()(void* memory) const { operator delete[](memory, std::align_val_t{64}); }
};

// Memory for one thread's intermediate results, not initialised. It begins a cache line, as
// torch's tensors do: products may round by the place of their operands in one.
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
