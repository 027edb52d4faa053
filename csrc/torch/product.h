// product -- torch's matrix product on pieces of packed memory, for loops over groups.
//
// Called inside parallel() each product runs on the one thread that calls it, and what it
// makes stays in that thread's cache for the next step. The shims do not go through the
// dispatcher: about a microsecond a call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <memory>
#include <type_traits>

#include "tensor.h"

namespace vmoe {

template <typename T>
Tensor strided(const T* data, int64_t rows, int64_t columns, int64_t row, int64_t column) {
  constexpr auto dtype = std::is_same_v<T, float> ? ScalarType::Float : ScalarType::Double;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<T*>(data), {rows, columns}, {row, column}, cpu, dtype);
}

// A packed matrix [rows, columns]; its memory stays the caller's.
template <typename T>
Tensor matrix(const T* data, int64_t rows, int64_t columns) {
  return strided(data, rows, columns, columns, 1);
}

// The transpose, [columns, rows], of a packed matrix [rows, columns].
template <typename T>
Tensor transposed(const T* data, int64_t rows, int64_t columns) {
  return strided(data, columns, rows, 1, columns);
}

// out = a b
inline void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out += a b
inline void multiply_add(const Tensor& out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
}

// Memory for one thread's intermediate results, not initialised.
template <typename T>
std::unique_ptr<T[]> scratch(int64_t size) {
  return std::unique_ptr<T[]>(new T[size]);
}

// parallel() for bodies that call products: each is worth some thousand elements' work.
template <typename Body>
void parallel_products(int64_t count, int64_t elements_each, Body&& body) {
  parallel(count, 4096 + elements_each, body);
}

}  // namespace vmoe
