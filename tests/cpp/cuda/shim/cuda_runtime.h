// cuda_runtime -- an emulator that runs the kernels of csrc/cuda on the host. This header replaces
// the header of the same name of the CUDA toolkit.
//
// This folder comes first in the include path, so that a .cu file compiles as plain C++. A launch
// runs its blocks one after another. A cooperative launch switches between all its blocks. The
// threads of a block are fibers (runner.cpp). A fiber runs until it has to wait: in __syncthreads,
// in a warp operation, or for another block to change an atomic (cuda/atomic).
//
// Errors that would give a wrong result or a hang on a GPU end the program, and print the state of
// each thread: a barrier that not all threads reach; a warp operation whose mask names lanes that
// do not take part or are in another operation; a shuffle from a lane outside the mask.
//
// Shared memory is filled with garbage before every block. --schedule sets the order in which
// threads and blocks run: if a result depends on the order, a barrier is missing. AddressSanitizer
// checks addresses, if built with -fsanitize=address.
//
// Only the parts of CUDA that the kernels use are emulated. Clusters, streams, memory order and
// speed are not modelled. Code of this folder also replaces CUB (cub/), the tensor-core
// instructions (tensor_core.h), the conversions of 16-bit types, the functions expf and fmaf of
// nvcc, and the CUDA functions of torch that the bindings call (torch_cuda.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#include "tensor_core.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // shared.ld places all these variables in one section

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// The runner sets these when it switches to another thread.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace shim {

enum class Schedule { kForward, kBackward, kShuffled };
inline Schedule schedule = Schedule::kForward;

// The most dynamic shared memory of a block, in bytes. Tests lower it to reach other kernels.
inline size_t shared_limit = 227 << 10;

// The last limit of dynamic shared memory that was set by cudaFuncSetAttribute.
inline int shared_allowed = 0;

// Number of multiprocessors, which is also the most blocks of a cooperative launch.
inline int multiprocessors = 4;

// Calls `thread` once for every thread of the grid. With `cooperative` all blocks are co-resident.
void run(
    dim3 grid, dim3 threads, size_t shared, bool cooperative, const std::function<void()>& thread);

// Called before an atomic is read and after it is written. A thread that reads atomics in a loop
// waits before each further read until another thread has written an atomic.
void before_atomic_read();
void after_atomic_write();

// Dynamic shared memory of the running block.
void* dynamic_shared();

// A barrier of the block. Returns the sum of the values of all its threads.
int wait_for_block(const char* barrier, int value);

// An operation of the lanes in `mask`. Takes the value of this lane, and returns its result.
enum class WarpOp { kSync, kShuffle, kBallot, kMatch, kMin, kMax, kAdd, kOr, kInstruction };
uint64_t wait_for_warp(WarpOp op, unsigned mask, uint64_t value, int source);

int lane();

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, int width) {
  // A lane whose source is outside its segment reads its own value, as in CUDA.
  const int begin = lane() & ~(width - 1);
  if (source < begin || source >= begin + width) source = lane();
  return from_bits<T>(wait_for_warp(WarpOp::kShuffle, mask, to_bits(value), source));
}

}  // namespace shim

inline void __syncthreads() { shim::wait_for_block("__syncthreads", 0); }
inline int __syncthreads_count(int predicate) {
  return shim::wait_for_block("__syncthreads_count", predicate != 0);
}
inline int __syncthreads_or(int predicate) { return __syncthreads_count(predicate) > 0; }

inline void __syncwarp(unsigned mask = 0xFFFFFFFF) {
  shim::wait_for_warp(shim::WarpOp::kSync, mask, 0, 0);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return shim::shuffle(mask, value, (shim::lane() & ~(width - 1)) + source % width, width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int turn, int width = 32) {
  return shim::shuffle(mask, value, shim::lane() ^ turn, width);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return shim::shuffle(mask, value, shim::lane() - static_cast<int>(by), width);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  return shim::shuffle(mask, value, shim::lane() + static_cast<int>(by), width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(shim::wait_for_warp(shim::WarpOp::kBallot, mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
  return static_cast<unsigned>(
      shim::wait_for_warp(shim::WarpOp::kMatch, mask, shim::to_bits(value), 0));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(shim::wait_for_warp(shim::WarpOp::kMax, mask, value, 0));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(shim::wait_for_warp(shim::WarpOp::kMin, mask, value, 0));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(shim::wait_for_warp(shim::WarpOp::kAdd, mask, value, 0));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
  return static_cast<unsigned>(shim::wait_for_warp(shim::WarpOp::kOr, mask, value, 0));
}

// Only one thread runs at a time, so plain accesses are atomic.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T>
T atomicOr(T* at, T value) {
  const T before = *at;
  *at |= value;
  return before;
}

inline float __expf(float x) { return std::exp(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(bits) : 32; }
inline int __clzll(long long bits) { return bits ? __builtin_clzll(bits) : 64; }

// The functions of the CUDA runtime. Device memory is on the heap, so that ASan checks its bounds.
// An allocation of 0 bytes is a null pointer. Copies from or to a null pointer are errors.
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool shared = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = shared ? static_cast<int>(shim::shared_limit) : shim::multiprocessors;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int value) {
  return shim::shared_allowed = value, cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** memory, size_t size) {
  *memory = size > 0 ? static_cast<T*>(malloc(size)) : nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return free(memory), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind) {
  if (!to || !from) return cudaErrorInvalidValue;
  return memcpy(to, from, size), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t size, cudaStream_t) {
  if (!memory) return cudaErrorInvalidValue;
  return memset(memory, value, size), cudaSuccess;
}
template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args... args) {
  const bool cooperative = config->numAttrs > 0 && config->attrs->val.cooperative;
  shim::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, cooperative, [&] {
    kernel(args...);
  });
  return cudaSuccess;
}
