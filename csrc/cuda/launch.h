// launch -- what every kernel here needs of CUDA's runtime: its start, its shared memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace vmoe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// The most shared memory that a kernel declares itself.
constexpr int kDeclaredShared = 13 << 10;

// Dynamic shared memory that a block may ask for on this device, besides what it declares.
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes - kDeclaredShared;
}

// By the runtime's call and not by <<<>>>: the tests compile kernels for the host too, as
// C++ (tests/cpp/cuda/shim). Errors stay with the runtime, for the caller to ask for once. Blocks
// that are `together` are all there at once and may wait for each other (block_barrier.h).
template <typename... Params, typename... Args>
void launch_blocks(
    bool together, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
    cudaStream_t stream, Args... args) {
  if (blocks == 0) return;
  constexpr size_t kWithoutAsking = (48 << 10) - kDeclaredShared;  // of 48 KiB for both
  if (shared > kWithoutAsking) {
    // Never less: another thread may be about to start the same kernel with more.
    cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_limit()));
  }
  cudaLaunchConfig_t config = {};
  // Too many stay too many, which is an error, and do not become a few.
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, UINT32_MAX)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = together;
  config.attrs = &attribute;
  config.numAttrs = together ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

template <typename... Params, typename... Args>
void launch(
    void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
    Args... args) {
  launch_blocks(false, kernel, blocks, threads, shared, stream, args...);
}

// Of this device. So many blocks may be together: there is room for one that can be launched at all
// on each.
inline int64_t multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// The block's dynamic shared memory, aligned to 16 bytes.
template <typename T>
__device__ T* dynamic_shared() {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic[];
  return reinterpret_cast<T*>(dynamic);
#else
  return static_cast<T*>(shim::dynamic_shared());
#endif
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a thread loads or stores at once at best.
template <typename T>
constexpr int kWideEntries = 16 / sizeof(T);
template <typename T>
struct alignas(16) Wide {
  T entry[kWideEntries<T>];
};

// What is handed out of one allocation, piece by piece; without memory it only adds up.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr size_t kAlignment = 256;
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + size_) : nullptr;
    size_ += (static_cast<size_t>(count) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  size_t size() const { return size_; }

 private:
  char* memory_;
  size_t size_ = 0;
};

}  // namespace vmoe::cuda
