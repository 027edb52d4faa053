// block_barrier -- a barrier of all blocks of a cooperative launch (launch_blocks).
#pragma once

#include <cuda/atomic>

#include "launch.h"

namespace vmoe::cuda {

// Writes before the barrier, by any thread, are visible after it to all threads by ordinary loads.
// Loads through const __restrict__ pointers may return stale values.
//
// The first __syncthreads orders a block's writes before its first thread's increment, which
// releases them to the device. The increments form one chain of updates, so acquiring the last one
// makes the writes before each of them visible. The second __syncthreads orders that before the
// loads of the block's threads.
//
// The count is never reset: turn n ends at n * blocks. It may wrap around.
class BlockBarrier {
 public:
  // `arrived` is 0 before the launch.
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
