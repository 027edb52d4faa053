// block_barrier -- where blocks that are together (launch_blocks) wait for each other.
#pragma once

#include <cuda/atomic>

#include "launch.h"

namespace vmoe::cuda {

// What any thread of these blocks wrote before it, all of them see behind it, by ordinary loads
// (not by those of memory that is said to be constant: const __restrict__). __syncthreads puts the
// writes of a block before its first thread's increment, which releases them to the device; the
// increments are one chain of updates, so who acquires the last one sees what was before each; and
// the second __syncthreads puts that before the loads of its block's threads.
//
// The count is never set back: turn n is over at n * blocks. It may wrap around.
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
