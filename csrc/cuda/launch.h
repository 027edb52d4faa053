// launch -- kernel launches, shared memory and workspaces of all CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace vmoe::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Upper bound, in bytes, on the static shared memory of a kernel that has dynamic shared memory.
constexpr int kDeclaredShared = 13 << 10;

// The most dynamic shared memory, in bytes, that a block can have on this device, beside up to
// kDeclaredShared bytes of static shared memory.
inline int64_t shared_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes - kDeclaredShared;
}

// Launches a kernel by a function of the CUDA runtime instead of <<<>>>, because tests also compile
// the kernels as C++ for the host emulator (tests/cpp/cuda/shim). The runtime stores the error of a
// launch. The caller checks for errors once, after all launches of an op. With `cooperative` all
// blocks are co-resident, so they may wait for each other (block_barrier.h).
template <typename... Params, typename... Args>
void launch_blocks(
    bool cooperative, void (*kernel)(Params...), int64_t blocks, int threads, size_t shared,
    cudaStream_t stream, Args... args) {
  if (blocks == 0) return;
  // Up to 48 KiB of static and dynamic shared memory in total need no attribute.
  constexpr size_t kWithoutAttribute = (48 << 10) - kDeclaredShared;
  if (shared > kWithoutAttribute) {
    // Sets the limit of the device, not `shared`: another thread may be about to launch the same
    // kernel with more shared memory.
    cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_limit()));
  }
  cudaLaunchConfig_t config = {};
  // Clamp, do not wrap: an oversized grid must fail at launch.
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, UINT32_MAX)));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

template <typename... Params, typename... Args>
void launch(
    void (*kernel)(Params...), int64_t blocks, int threads, size_t shared, cudaStream_t stream,
    Args... args) {
  launch_blocks(false, kernel, blocks, threads, shared, stream, args...);
}

// Number of multiprocessors of this device. A cooperative launch can always have this many blocks,
// one per multiprocessor.
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

// Number of entries in 16 bytes, which is the most that a thread loads or stores in one
// instruction.
template <typename T>
constexpr int kWideEntries = 16 / sizeof(T);
template <typename T>
struct alignas(16) Wide {
  T entry[kWideEntries<T>];
};

// Divides one allocation into arrays, aligned to 256 bytes. A Workspace that is constructed with
// null returns null arrays, and only adds up their sizes.
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
