// device -- what the tests of several kernels share: arrays on the device, the same for a GPU and
// for the host that stands for one.
#pragma once

#include <cuda_runtime.h>

#include "../testing.h"

namespace vmoe {

inline void expect_success(cudaError_t error) {
  ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
}

// Memory of the size asked for and no more, so that a sanitizer sees its ends; what was not
// written is full of one byte that no kernel writes by chance.
template <typename T>
class DeviceArray {
 public:
  explicit DeviceArray(int64_t size) : size_(size) {
    expect_success(cudaMalloc(&memory_, size * sizeof(T)));
    expect_success(cudaMemsetAsync(memory_, 0xA5, size * sizeof(T), nullptr));
  }
  DeviceArray(const std::vector<T>& values) : DeviceArray(static_cast<int64_t>(values.size())) {
    expect_success(cudaMemcpy(memory_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~DeviceArray() { expect_success(cudaFree(memory_)); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() { return memory_; }

  // Waits for the kernels.
  std::vector<T> values() const {
    std::vector<T> out(size_);
    expect_success(cudaGetLastError());
    expect_success(cudaDeviceSynchronize());
    expect_success(cudaMemcpy(out.data(), memory_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return out;
  }

 private:
  int64_t size_;
  T* memory_ = nullptr;
};

// The same bits: NaN equals itself, and 0 is not -0.
template <typename T>
void expect_same(const std::vector<T>& actual, const std::vector<T>& wanted) {
  ASSERT_EQ(actual.size(), wanted.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(memcmp(&actual[i], &wanted[i], sizeof(T)), 0) << "at " << i;
  }
}

}  // namespace vmoe
