// tensor -- the parts of LibTorch's stable ABI that the bindings use, and helpers for bindings.
//
// Every binding in this folder is compiled twice: into _C for the CPU and, with VMOE_DEVICE_CUDA
// defined, into _C_cuda. Checks and allocation are thus written once. The checks here keep memory
// safe if a raw op is called with untrusted arguments. The public Python functions check first,
// with messages in the words of the user.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "../common/half.h"
#include "../common/parallel.h"
#include "huge_pages.h"

#ifdef VMOE_DEVICE_CUDA
#include <cuda_runtime.h>
#define VMOE_DEVICE CUDA
#else
#define VMOE_DEVICE CPU
#endif

// torch 2.11 has only TORCH_ERROR_CODE_CHECK. In later versions, STABLE_TORCH_ERROR_CODE_CHECK
// keeps the error message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// Two macros, so that VMOE_DEVICE is expanded before the inner macro pastes it.
#define VMOE_REGISTER_(device, m) STABLE_TORCH_LIBRARY_IMPL(vmoe_routers, device, m)
#define VMOE_REGISTER(m) VMOE_REGISTER_(VMOE_DEVICE, m)

namespace vmoe {
namespace cpu {}
namespace cuda {}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_shape(
    const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t axis = 0;
  for (const int64_t size : shape) same = same && tensor.size(axis++) == size;
  if (same) return;
  std::string want, got;
  const auto add = [](std::string& list, int64_t size) {
    if (!list.empty()) list += ", ";
    list += std::to_string(size);
  };
  for (const int64_t size : shape) add(want, size);
  for (const int64_t size : tensor.sizes()) add(got, size);
  STD_TORCH_CHECK(false, op, ": ", name, " has shape [", got, "], wanted [", want, "]");
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == dtype, op, ": ", name, " has dtype ",
      torch::headeronly::toString(tensor.scalar_type()), ", wanted ",
      torch::headeronly::toString(dtype));
}

inline void check_dim(const char* op, const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(
      tensor.dim() == dim, op, ": ", name, " has ", tensor.dim(), " axes, wanted ", dim);
}

// The tensor itself if it is contiguous, else a contiguous copy.
inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> packed(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(packed(*tensor)) : std::nullopt;
}

// A new contiguous tensor on the device of `like`, with the dtype of `like` unless `dtype` is
// given. Faster than torch::stable::new_empty, which goes through the dispatcher twice.
inline Tensor empty(
    std::initializer_list<int64_t> shape, const Tensor& like,
    std::optional<ScalarType> dtype = {}) {
  std::array<int64_t, 8> strides;
  STD_TORCH_CHECK(shape.size() <= strides.size());
  int64_t stride = 1;
  for (size_t axis = shape.size(); axis-- > 0;) {
    const int64_t size = shape.begin()[axis];
    strides[axis] = stride;
    STD_TORCH_CHECK(
        size >= 0 && !__builtin_mul_overflow(stride, std::max<int64_t>(1, size), &stride),
        "a result of ", size, " entries along axis ", axis, " does not fit int64");
  }
  int32_t type, device;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.begin(), strides.data(), type, device,
      like.get_device_index(), &handle));
  Tensor tensor(handle);
#ifndef VMOE_DEVICE_CUDA
  const size_t bytes = tensor.numel() * aoti_torch_dtype_element_size(type);
  if (bytes >= kHugePage) ask_huge_pages(tensor.mutable_data_ptr(), bytes);
#endif
  return tensor;
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* write(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Calls body(float{}) or body(double{}), by the dtype of the tensor.
template <typename Body>
void by_dtype(const char* op, const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    default:
      STD_TORCH_CHECK(
          false, op, ": dtype ", torch::headeronly::toString(tensor.scalar_type()),
          ", wanted Float or Double");
  }
}

// Calls body(Row{}) with the dtype of the tensor, which may be a 16-bit type too.
template <typename Body>
void by_row_dtype(const char* op, const Tensor& tensor, Body&& body) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return body(BFloat16{});
    case ScalarType::Half:
      return body(Float16{});
    default:
      return by_dtype(op, tensor, body);
  }
}

// The dtype of Compute<Row> for a tensor of Row.
inline ScalarType compute_dtype(const Tensor& rows) {
  return rows.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body(begin, end) on ranges that partition [0, count), in parallel. `elements_each` is the
// work of one index in elements. A range has at least about 16k elements, because less work is not
// worth a thread.
template <typename Body>
void parallel(int64_t count, int64_t elements_each, Body&& body) {
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, elements_each));
  torch::stable::parallel_for(0, count, grain, body);
}

// Calls body(begin, end, inside) on ranges of groups. If there are at least as many groups as
// threads, the ranges run in parallel. Else one call has all groups, and may divide each group
// among the threads by `inside`.
template <typename Body>
void parallel_groups(int64_t groups, int64_t elements_each, Body&& body) {
  if (groups >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    return parallel(
        groups, elements_each, [&](int64_t begin, int64_t end) { body(begin, end, Parallel{}); });
  }
  const Parallel inside{[](int64_t count, Parallel::Body piece, const void* context) {
    torch::stable::parallel_for(
        0, count, 1, [=](int64_t begin, int64_t end) { piece(begin, end, context); });
  }};
  body(0, groups, inside);
}

#ifdef VMOE_DEVICE_CUDA
// Calls body(stream) while the device of `tensor` is the current device. `stream` is the current
// stream of torch on that device. Throws if one of `others` is on another device, or if a launch in
// body failed.
template <typename Body>
void on_device(
    const char* op, const Tensor& tensor, std::initializer_list<Tensor> others, Body&& body) {
  const auto device = tensor.get_device_index();
  for (const Tensor& other : others) {
    STD_TORCH_CHECK(
        other.is_cuda() && other.get_device_index() == device, op,
        ": all tensors must be on cuda:", device);
  }
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  body(static_cast<cudaStream_t>(stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Scratch memory for one call. The allocator of torch reuses the memory in the order of the stream,
// also while a CUDA graph is captured.
inline Tensor workspace(const Tensor& like, size_t bytes) {
  return empty({static_cast<int64_t>(bytes)}, like, ScalarType::Byte);
}

namespace device = cuda;

// Calls body(where...) with the last arguments of a kernel that computes rows. On CUDA there is one
// call, with the stream. On a CPU there are parallel calls, each with a range [begin, end) of the
// rows. `elements_each` is the work per row. Throws if the tensors are not on one CUDA device.
template <typename Body>
void each_row(
    const char* op, int64_t, int64_t, std::initializer_list<Tensor> tensors, Body&& body) {
  on_device(op, *tensors.begin(), tensors, body);
}
#else
namespace device = cpu;

template <typename Body>
void each_row(
    const char*, int64_t rows, int64_t elements_each, std::initializer_list<Tensor>, Body&& body) {
  parallel(rows, elements_each, body);
}
#endif

}  // namespace vmoe
