// cuda_runtime -- a stand-in for CUDA's header, that has the kernels of csrc/cuda run on the host.
//
// Found before the real one, it makes a .cu file plain C++. A launch runs its blocks one after
// another, a cooperative one all of them in turns; the threads of a block are fibers (runner.cpp)
// that go on until they wait for each other, in __syncthreads, in an operation of their warp or for
// an atomic of another block's to change (cuda/atomic beside this). What a GPU would answer with a
// wrong result or a hang ends the program here, with a line that says where the threads are: a
// barrier that some do not reach, an operation whose mask names lanes that do not take part or do
// another one, a shuffle from outside the mask. Shared memory is filled with rubbish before every
// block, and --schedule sets the order in which threads and blocks run: a result that depends on it
// lacks a barrier. Addresses are ASan's business: build with -fsanitize=address.
//
// Only what the kernels use is here. Not modelled: clusters, streams, memory order, speed. Not run,
// but stood in for: CUB's code (cub/ beside this), the instructions of tensor cores
// (tensor_core.h), the conversions of 16-bit types, nvcc's own arithmetic (expf, fused
// multiply-adds), and what the bindings ask of torch's CUDA (torch_cuda.h).
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
#define __shared__ static  // shared.ld beside this puts them all into one place

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

// The runner sets these whenever another thread goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace shim {

enum class Schedule { kForward, kBackward, kShuffled };
inline Schedule schedule = Schedule::kForward;

// What a block may have of dynamic shared memory; tests lower it to reach other kernels.
inline size_t shared_limit = 227 << 10;

// What a kernel was last allowed of it by cudaFuncSetAttribute.
inline int shared_allowed = 0;

// As many blocks of a cooperative launch has the device room for, whatever they are like.
inline int multiprocessors = 4;

// Runs `thread` once for every thread of the grid; with `together` all blocks are there at once.
void run(
    dim3 grid, dim3 threads, size_t shared, bool together, const std::function<void()>& thread);

// A thread that reads again waits until some atomic was written since.
void before_atomic_read();
void after_atomic_write();

// Dynamic shared memory of the block that runs.
void* dynamic_shared();

// A barrier of the block; returns the sum of what its threads brought.
int wait_for_block(const char* barrier, int value);

// An operation of the lanes in `mask`: gets everyone's value, returns this lane's result.
enum class WarpOp { kSync, kShuffle, kBallot, kMatch, kMin, kMax, kAdd, kOr, kTogether };
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
  // A source outside the width is the lane itself, as with __shfl_up_sync at the edge.
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

// One thread runs at a time.
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

// The runtime's calls. Device memory is the heap, so that ASan sees its ends. No memory is a null
// pointer, as a driver has it, and is no place to write to or read from.
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
  const bool together = config->numAttrs > 0 && config->attrs->val.cooperative;
  shim::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, together, [&] {
    kernel(args...);
  });
  return cudaSuccess;
}
