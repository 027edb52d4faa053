// device -- device arrays and comparisons that the tests of CUDA kernels share, on GPUs and on the
// emulator.
#pragma once

#include <cuda_runtime.h>

#include "../testing.h"
#include "common/half.h"

namespace vmoe {

inline void expect_success(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

// An array in device memory. Its allocation has exactly the size of the array, so that a sanitizer
// checks the bounds. The array is filled with a byte that kernels are unlikely to write. An empty
// array is a null pointer, which functions of the runtime may reject even for a size of 0.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) : size_(size) {
    if (size_ == 0) return;
    expect_success(cudaMalloc(&memory_, size * sizeof(T)));
    expect_success(cudaMemsetAsync(memory_, 0xA5, size * sizeof(T), nullptr));
  }
  DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    if (size_ == 0) return;
    expect_success(cudaMemcpy(memory_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { expect_success(cudaFree(memory_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() { return memory_; }

  // Waits for all kernels, and copies the array to the host.
  std::vector<T> values() const {
    std::vector<T> out(size_);
    expect_success(cudaGetLastError());
    expect_success(cudaDeviceSynchronize());
    if (size_ == 0) return out;
    expect_success(cudaMemcpy(out.data(), memory_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  int64_t size_;
  T* memory_ = nullptr;
};

// Compares bits: NaN equals itself, and 0 differs from -0.
template <typename T>
void expect_same(const std::vector<T>& actual, const std::vector<T>& wanted) {
  ASSERT_EQ(actual.size(), wanted.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(memcmp(&actual[i], &wanted[i], sizeof(T)), 0) << "at " << i;
  }
}

using Rows = ::testing::Types<float, double, BFloat16, Float16>;
using Halves = ::testing::Types<BFloat16, Float16>;

// A random small number that every type represents exactly.
inline float number(std::mt19937_64& random) {
  return static_cast<float>(integer(random, -32, 32)) / 16;
}

inline void set(float& to, float value) { to = value; }
inline void set(double& to, float value) { to = value; }
inline void set(BFloat16& to, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  to.bits = static_cast<uint16_t>(bits >> 16);
}
inline void set(Float16& to, float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  const uint32_t magnitude = bits & 0x7FFFFFFF;
  to.bits = static_cast<uint16_t>(
      (bits >> 16 & 0x8000) | (magnitude ? (magnitude - (112u << 23)) >> 13 : 0));
}

template <typename Row>
std::vector<Row> rows(int64_t size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<Row> out(size);
  for (Row& value : out) set(value, number(random));
  return out;
}

// The inverse of `set`. value_of converts every value, including infinities, NaN and subnormal
// numbers.
inline float value_of(float row) { return row; }
inline double value_of(double row) { return row; }
inline float value_of(BFloat16 row) {
  const uint32_t bits = uint32_t{row.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float value_of(Float16 row) {
  const int exponent = row.bits >> 10 & 31, fraction = row.bits & 1023;
  float value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
  if (exponent == 0) value = std::ldexp(static_cast<float>(fraction), -24);
  if (exponent == 31) value = fraction ? kNaN<float> : kInf<float>;
  return row.bits >> 15 ? -value : value;
}

template <typename Row>
std::vector<Compute<Row>> values_of(const std::vector<Row>& rows) {
  std::vector<Compute<Row>> out;
  for (const Row& row : rows) out.push_back(value_of(row));
  return out;
}

// The largest relative error of rounding to a 16-bit type.
template <typename Row>
constexpr double kUnit = 0;
template <>
constexpr double kUnit<BFloat16> = 0x1p-8;
template <>
constexpr double kUnit<Float16> = 0x1p-11;

// Compares with a result of the CPU kernel, up to rounding to the dtype of the rows.
template <typename Row>
void expect_rounded(const std::vector<Row>& actual, const std::vector<Compute<Row>>& wanted) {
  using T = Compute<Row>;
  ASSERT_EQ(actual.size(), wanted.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = value_of(actual[i]), w = wanted[i];
    const double tolerance = kUnit<Row> * std::abs(w) + kRounding<T> * (1 + std::abs(w));
    const bool same = std::isnan(w)   ? std::isnan(a)
                      : std::isinf(w) ? a == w
                                      : std::abs(a - w) <= tolerance;
    EXPECT_TRUE(same) << "[" << i << "] is " << a << ", wanted " << w;
  }
}

}  // namespace vmoe
