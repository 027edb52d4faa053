// The host that stands for a GPU must see what a GPU would not forgive.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <vector>

#include "cuda/launch.h"

namespace vmoe {
namespace {

using cuda::kAllLanes;

template <typename... Params, typename... Args>
void start(void (*kernel)(Params...), int64_t blocks, int threads, Args... args) {
  cuda::launch(kernel, blocks, threads, 64, nullptr, args...);
}

__global__ void reverse(const int* from, int* to) {
  __shared__ int values[256];
  values[threadIdx.x] = from[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  to[blockIdx.x * blockDim.x + threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

TEST(Shim, ThreadsMeetAtBarriers) {
  std::vector<int> from(3 * 256), to(3 * 256);
  for (int i = 0; i < 3 * 256; ++i) from[i] = i;
  start(reverse, 3, 256, from.data(), to.data());
  for (int i = 0; i < 3 * 256; ++i) ASSERT_EQ(to[i], i / 256 * 256 + 255 - i % 256);
}

__global__ void warp_operations(unsigned* out) {
  const unsigned lane = threadIdx.x % 32, half = lane < 16 ? 0xFFFF : 0xFFFF0000;
  unsigned* mine = out + threadIdx.x * 8;
  mine[0] = __shfl_xor_sync(kAllLanes, lane, 5);
  mine[1] = __shfl_up_sync(kAllLanes, lane, 1);
  mine[2] = __shfl_sync(kAllLanes, lane, 3, 8);
  mine[3] = __ballot_sync(kAllLanes, lane % 3 == 0);
  mine[4] = __match_any_sync(kAllLanes, lane / 8);
  mine[5] = lane < 16 ? __reduce_max_sync(half, lane) : __reduce_min_sync(half, lane);
  mine[6] = static_cast<unsigned>(__shfl_down_sync(kAllLanes, double{1.0} * lane, 4));
  mine[7] = static_cast<unsigned>(__syncthreads_count(lane == 0));
}

TEST(Shim, WarpsExchangeValues) {
  std::vector<unsigned> out(64 * 8);
  start(warp_operations, 1, 64, out.data());
  for (unsigned i = 0; i < 64; ++i) {
    const unsigned lane = i % 32;
    const std::vector<unsigned> mine(out.begin() + i * 8, out.begin() + i * 8 + 8);
    const std::vector<unsigned> wanted{
        lane ^ 5,
        lane > 0 ? lane - 1 : 0,
        lane / 8 * 8 + 3,
        0x49249249,
        0xFFu << lane / 8 * 8,
        lane < 16 ? 15u : 16u,
        lane < 28 ? lane + 4 : lane,
        2};
    EXPECT_EQ(mine, wanted) << i;
  }
}

__global__ void some_skip_the_barrier() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void some_lanes_skip() {
  if (threadIdx.x < 8) __syncwarp();
}
__global__ void lanes_differ() {
  if (threadIdx.x < 8) {
    __ballot_sync(kAllLanes, 1);
  } else {
    __syncwarp();
  }
}
__global__ void mask_without_itself() { __syncwarp(2); }
__global__ void from_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xFFFF, 1, 20);
}
__global__ void wait_crosswise() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x == 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
__global__ void uninitialised(int* out) {
  __shared__ int value;
  if (threadIdx.x == 1) value = 7;
  out[threadIdx.x] = value;  // no barrier in between
}
#ifdef __SANITIZE_ADDRESS__
__global__ void behind_shared() { cuda::dynamic_shared<char>()[64 + threadIdx.x] = 1; }
__global__ void behind_declared(int* out) {
  __shared__ int values[4];
  int* volatile begin = values;  // what it points to is not for the compiler to see
  begin[threadIdx.x + blockDim.x - 1] = 1;
  *out = values[0];
}
#endif

TEST(ShimDeathTest, MistakesEndTheProgram) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(start(some_skip_the_barrier, 1, 64), "a barrier that not all threads");
  EXPECT_DEATH(start(some_lanes_skip, 1, 32), "a mask names a lane that has returned");
  EXPECT_DEATH(start(lanes_differ, 1, 32), "lanes of one mask are in different operations");
  EXPECT_DEATH(start(mask_without_itself, 1, 1), "a mask without the lane that calls");
  EXPECT_DEATH(start(from_outside, 1, 32), "a shuffle from a lane outside its mask");
  EXPECT_DEATH(start(wait_crosswise, 1, 64), "wait for each other for ever");
  EXPECT_DEATH(start(some_lanes_skip, (int64_t{1} << 32) + 1, 8), "a grid of too many blocks");
#ifdef __SANITIZE_ADDRESS__
  EXPECT_DEATH(start(behind_shared, 1, 1), "AddressSanitizer");
  int out;
  EXPECT_DEATH(start(behind_declared, 1, 5, &out), "AddressSanitizer");
#endif
}

// Thread 1 writes what the others read without waiting: one order or the other shows it.
TEST(Shim, SharedMemoryBeginsAsRubbish) {
  const shim::Schedule before = shim::schedule;
  std::vector<int> out(4, 0);
  shim::schedule = shim::Schedule::kForward;
  start(uninitialised, 1, 4, out.data());
  EXPECT_TRUE(out[0] != 7 && out[3] == 7);
  shim::schedule = shim::Schedule::kBackward;
  start(uninitialised, 1, 4, out.data());
  EXPECT_TRUE(out[0] == 7 && out[3] != 7);
  shim::schedule = before;
}

}  // namespace
}  // namespace vmoe
