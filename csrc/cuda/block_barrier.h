// block_barrier -- a barrier of all blocks of a cooperative launch (launch_blocks).
#pragma once

#include <cuda/atomic>

#include "launch.h"

namespace vmoe::cuda {

// After wait(), ordinary loads of every thread return the values that any thread of any block wrote
// before wait(). Loads through const __restrict__ pointers may return stale values.
//
// Memory order: the first __syncthreads orders the writes of a block before the increment by its
// first thread. The increment releases them to the device. All increments form one release
// sequence. So the thread that acquires the last increment sees the writes before every increment.
// The second __syncthreads orders the acquire before the loads of the other threads of the block.
//
// The counter is never reset. The n-th barrier ends when the counter reaches n * blocks, modulo
// 2^32.
class BlockBarrier {
 public:
  // arrived: the counter, in device memory, which is 0 before the launch.
  __device__ BlockBarrier(unsigned* arrived, int64_t blocks)
      : arrived_(arrived), blocks_(static_cast<unsigned>(blocks)) {}

  __device__ void wait() {
    awaited_ += blocks_;
    __syncthreads();
    if (threadIdx.x == 0) {
      const ::cuda::atomic_ref<unsigned, ::cuda::thread_scope_device> arrived(*arrived_);
      arrived.fetch_add(1, ::cuda::memory_order_release);
      while (static_cast<int>(arrived.load(::cuda::memory_order_acquire) - awaited_) < 0) {
      }
    }
    __syncthreads();
  }

 private:
  unsigned* arrived_;
  unsigned blocks_, awaited_ = 0;
};

}  // namespace vmoe::cuda
