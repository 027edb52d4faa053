// block_scan -- the part of cub::BlockScan that the kernels use.
#pragma once

#include <cuda_runtime.h>

namespace cub {

template <typename T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockScan(TempStorage& storage) : storage_(storage) {}

  void ExclusiveSum(T input, T& output) {
    T total;
    ExclusiveSum(input, output, total);
  }
  void ExclusiveSum(T input, T& output, T& total) {
    storage_.values[threadIdx.x] = input;
    __syncthreads();
    T sum{}, before{};
    for (int i = 0; i < kThreads; ++i) {
      if (i == static_cast<int>(threadIdx.x)) before = sum;
      sum = sum + storage_.values[i];
    }
    output = before;
    total = sum;  // no barrier, as in CUB: callers need a barrier before they reuse the storage
  }

 private:
  TempStorage& storage_;
};

}  // namespace cub
