// Tests of the emulator. The emulator must report errors in kernels that would give a wrong result
// or a hang on a GPU.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cub/device/device_radix_sort.cuh>
#include <stdexcept>
#include <vector>

#include "cuda/block_barrier.h"
#include "cuda/launch.h"
#include "cuda/tensor_core.h"
#include "device.h"
#include "topk.h"

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

TEST(Shim, BarriersSynchroniseThreads) {
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

// to = a b with a [16, 16] and b [16, 8], stored as they are or, with kTransposed, both transposed.
template <typename Row, bool kTransposed>
__global__ void multiply(const Row* a, const Row* b, float* to) {
  const int lane = static_cast<int>(threadIdx.x);
  Row* shared = cuda::dynamic_shared<Row>();  // a, then b
  for (int piece = lane; piece < (kTransposed ? 48 : 64); piece += 32) {
    const bool of_a = piece < 32;
    cuda::copy_async(
        cuda::shared_place(shared + piece * 8), of_a ? a + piece * 8 : b + (piece - 32) * 8,
        of_a || kTransposed || piece < 48);
  }
  cuda::commit_copies();
  cuda::await_copies<0>();
  __syncwarp();
  // The matrices of a are upper left, lower left, upper right, lower right.
  uint32_t from_a[4], from_b[4];
  const int down = lane / 8 % 2 * 8, right = lane / 16 * 8;
  if constexpr (kTransposed) {  // shared has a^T [16, 16], then b^T [8, 16]
    cuda::load_transposed(from_a, cuda::shared_place(shared + (lane % 8 + right) * 16 + down));
    cuda::load_matrices(from_b, cuda::shared_place(shared + 256 + lane % 8 * 16 + down));
  } else {  // shared has a [16, 16], then b [16, 8], then zeros
    cuda::load_matrices(from_a, cuda::shared_place(shared + (lane % 8 + down) * 16 + right));
    cuda::load_transposed(from_b, cuda::shared_place(shared + 256 + lane % 16 * 8));
  }
  float sums[4] = {1, 1, 1, 1};
  cuda::multiply_add<Row>(sums, from_a, from_b[0], from_b[1]);
  for (int i = 0; i < 4; ++i) to[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <typename Row>
void expect_product() {
  const auto a = rows<Row>(256, 1), b = rows<Row>(128, 2);
  std::vector<Row> a_transposed(256), b_transposed(128);
  std::vector<float> wanted(128, 1), to(128);
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 16; ++i) a_transposed[k * 16 + i] = a[i * 16 + k];
    for (int j = 0; j < 8; ++j) b_transposed[j * 16 + k] = b[k * 8 + j];
    for (int i = 0; i < 128; ++i) {
      wanted[i] += value_of(a[i / 8 * 16 + k]) * value_of(b[k * 8 + i % 8]);
    }
  }
  cuda::launch(multiply<Row, false>, 1, 32, 1024, nullptr, a.data(), b.data(), to.data());
  EXPECT_EQ(to, wanted);
  cuda::launch(
      multiply<Row, true>, 1, 32, 1024, nullptr, a_transposed.data(), b_transposed.data(),
      to.data());
  EXPECT_EQ(to, wanted);
}

TEST(Shim, WarpsMultiplyMatrices) {
  expect_product<BFloat16>();
  expect_product<Float16>();
}

// Writes the destinations of two copies before and after each wait.
__global__ void copy(const int* from, int* to) {
  int* shared = cuda::dynamic_shared<int>();
  cuda::copy_async(cuda::shared_place(shared), from, true);
  cuda::commit_copies();
  cuda::copy_async(cuda::shared_place(shared + 4), from, false);
  cuda::commit_copies();
  to[0] = shared[0];
  cuda::await_copies<1>();
  to[1] = shared[0];
  to[2] = shared[4];
  cuda::await_copies<0>();
  to[3] = shared[4];
}

TEST(Shim, CopiesRunAtTheirStartOrInTheWait) {
  const shim::Schedule before = shim::schedule;
  alignas(16) const int from[4] = {7, 7, 7, 7};
  for (const bool late : {true, false}) {
    shim::schedule = late ? shim::Schedule::kForward : shim::Schedule::kBackward;
    std::vector<int> to(4);
    start(copy, 1, 1, from, to.data());
    EXPECT_EQ(to[0] == 7, !late);
    EXPECT_EQ(to[1], 7);
    EXPECT_EQ(to[2] == 0, !late);
    EXPECT_EQ(to[3], 0);
  }
  shim::schedule = before;
}

void start_cooperative(
    void (*kernel)(unsigned*, int*), int64_t blocks, int threads, unsigned* arrived, int* out) {
  cuda::launch_blocks(true, kernel, blocks, threads, 64, nullptr, arrived, out);
}

// Every block passes on its number in a ring of blocks, and must find its own shared memory
// unchanged at the end.
__global__ void pass_on_in_ring(unsigned* arrived, int* out) {
  __shared__ int own;
  cuda::BlockBarrier barrier(arrived, gridDim.x);
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  int* dynamic = cuda::dynamic_shared<int>();
  if (threadIdx.x == 0) own = dynamic[0] = block;
  int have = block;
  for (int turn = 0; turn < 3; ++turn) {
    int* places = out + turn % 2 * blocks;
    for (int i = 0; threadIdx.x >= 32 && i < 5 * block; ++i) __syncwarp(0xFF);  // delays some warps
    if (threadIdx.x == 33) places[block] = have;
    barrier.wait();
    have = places[(block + 1) % blocks];
  }
  if (threadIdx.x == 1) out[2 * blocks + block] = own == block && dynamic[0] == block ? have : -1;
}

TEST(Shim, BarriersSynchroniseBlocks) {
  unsigned arrived = 0;
  std::vector<int> out(12);
  start_cooperative(pass_on_in_ring, 4, 40, &arrived, out.data());
  EXPECT_EQ(std::vector(out.begin() + 8, out.end()), (std::vector{3, 0, 1, 2}));
  EXPECT_EQ(arrived, 12u);
}

__global__ void between_blocks(unsigned* arrived, int* out) {
  if (threadIdx.x == 0) out[blockIdx.x] = 7;
  cuda::BlockBarrier barrier(arrived + blockIdx.x, 1);  // does not wait for the other block
  barrier.wait();
  if (threadIdx.x == 0) out[2 + blockIdx.x] = out[1 - blockIdx.x];
}

TEST(Shim, MissingBarrierOfBlocksChangesTheResult) {
  const shim::Schedule before = shim::schedule;
  for (const auto schedule : {shim::Schedule::kForward, shim::Schedule::kBackward}) {
    shim::schedule = schedule;
    std::vector<unsigned> arrived(2);
    std::vector<int> out(4);
    start_cooperative(between_blocks, 2, 40, arrived.data(), out.data());
    EXPECT_EQ(out[2] == 7, schedule == shim::Schedule::kBackward);
    EXPECT_EQ(out[3] == 7, schedule == shim::Schedule::kForward);
  }
  shim::schedule = before;
}

__global__ void some_blocks_skip(unsigned* arrived, int*) {
  cuda::BlockBarrier barrier(arrived, gridDim.x);
  if (blockIdx.x > 0) barrier.wait();
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
__global__ void shuffle_from_outside() {
  if (threadIdx.x < 16) __shfl_sync(0xFFFF, 1, 20);
}
__global__ void deadlock() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else if (threadIdx.x == 32) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}
template <typename T>
__global__ void uninitialised(T* out) {
  __shared__ T value;
  if (threadIdx.x == 1) value = 7;
  out[threadIdx.x] = value;  // a barrier is missing before this line
}
__global__ void misaligned_copy(const char* from) {
  cuda::copy_async(cuda::shared_place(cuda::dynamic_shared<char>() + 8), from, true);
}
__global__ void copy_without_wait(const char* from) {
  cuda::copy_async(cuda::shared_place(cuda::dynamic_shared<char>()), from, true);
}
__global__ void different_instructions() {
  uint32_t to[4];
  if (threadIdx.x < 16) {
    cuda::load_matrices(to, cuda::shared_place(cuda::dynamic_shared<char>()));
  } else {
    cuda::load_transposed(to, cuda::shared_place(cuda::dynamic_shared<char>()));
  }
}
#ifdef __SANITIZE_ADDRESS__
__global__ void read_past_the_stack(int* out) {
  int values[4];
  int* volatile begin = values;  // hides the bounds from the compiler
  begin[0] = 1;
  __syncthreads();  // other fibers run in between
  *out = begin[threadIdx.x + 4];
}
__global__ void copy_past_dynamic_shared(const char* from) {
  cuda::copy_async(cuda::shared_place(cuda::dynamic_shared<char>() + 64), from, true);
  cuda::commit_copies();
  cuda::await_copies<0>();
}
__global__ void copy_from_past_the_end(const char* from) {
  cuda::copy_async(cuda::shared_place(cuda::dynamic_shared<char>()), from + 16, true);
  cuda::commit_copies();
  cuda::await_copies<0>();
}
__global__ void write_past_dynamic_shared() { cuda::dynamic_shared<char>()[64 + threadIdx.x] = 1; }
__global__ void write_past_static_shared(int* out) {
  __shared__ int values[4];
  int* volatile begin = values;  // hides the bounds from the compiler
  begin[threadIdx.x + blockDim.x - 1] = 1;
  *out = values[0];
}
#endif

TEST(ShimDeathTest, KernelErrorsEndTheProgram) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(start(some_skip_the_barrier, 1, 64), "a barrier that not all threads");
  EXPECT_DEATH(start(some_lanes_skip, 1, 32), "a mask names a lane that has returned");
  EXPECT_DEATH(start(lanes_differ, 1, 32), "lanes of one mask are in different operations");
  EXPECT_DEATH(start(mask_without_itself, 1, 1), "a mask without the calling lane");
  EXPECT_DEATH(start(shuffle_from_outside, 1, 32), "a shuffle from a lane outside its mask");
  EXPECT_DEATH(start(deadlock, 1, 64), "a deadlock: no thread can continue");
  EXPECT_DEATH(start(some_lanes_skip, (int64_t{1} << 32) + 1, 8), "a grid with too many blocks");
  EXPECT_DEATH(
      start(different_instructions, 1, 32), "lanes of a warp are in different instructions");
  EXPECT_DEATH(
      start(different_instructions, 1, 16), "a mask names lanes that the block does not have");
  alignas(16) const char from[16] = {};
  EXPECT_DEATH(start(misaligned_copy, 1, 1, from), "a misaligned access of 16 bytes");
  const shim::Schedule before = shim::schedule;
  shim::schedule = shim::Schedule::kForward;
  EXPECT_DEATH(
      start(copy_without_wait, 1, 1, from), "a thread returned without waiting for its copies");
  shim::schedule = before;
  unsigned arrived = 0;
  EXPECT_DEATH(
      start_cooperative(some_blocks_skip, 4, 1, &arrived, nullptr), "for an atomic to change");
  EXPECT_DEATH(
      start_cooperative(some_blocks_skip, 5, 1, &arrived, nullptr),
      "more blocks than multiprocessors");
  EXPECT_DEATH(
      start(some_blocks_skip, 4, 1, &arrived, nullptr), "a deadlock: no thread can continue");
#ifdef __SANITIZE_ADDRESS__
  EXPECT_DEATH(start(write_past_dynamic_shared, 1, 1), "AddressSanitizer");
  int out;
  EXPECT_DEATH(start(write_past_static_shared, 1, 5, &out), "AddressSanitizer");
  EXPECT_DEATH(start(read_past_the_stack, 1, 2, &out), "AddressSanitizer.*stack");
  EXPECT_DEATH(start(copy_past_dynamic_shared, 1, 1, from), "copy to a bad address");
  EXPECT_DEATH(start(copy_from_past_the_end, 1, 1, from), "copy from a bad address");
#endif
}

// Thread 1 writes a value that all threads read without a barrier. Threads that run before thread 1
// read garbage.
TEST(Shim, SharedMemoryStartsUninitialised) {
  const shim::Schedule before = shim::schedule;
  std::vector<int> out(4, 0);
  shim::schedule = shim::Schedule::kForward;
  start(uninitialised<int>, 1, 4, out.data());
  EXPECT_TRUE(out[0] != 7 && out[3] == 7);
  shim::schedule = shim::Schedule::kBackward;
  start(uninitialised<int>, 1, 4, out.data());
  EXPECT_TRUE(out[0] == 7 && out[3] != 7);
  shim::schedule = before;
}

__global__ void declaring(int* out) {
  __shared__ int values[cuda::kDeclaredShared / sizeof(int)];
  values[0] = 7;
  *out = values[0];
}

// A block may have 48 KiB of static and dynamic shared memory without the attribute. For more,
// every launch sets the attribute to the same limit, because several host threads may launch a
// kernel at the same time.
TEST(Shim, LargeSharedMemorySetsTheAttribute) {
  constexpr size_t kWithoutAttribute = 48 << 10,
                   kDynamic = kWithoutAttribute - cuda::kDeclaredShared;
  int out = 0;
  for (const size_t shared : {kDynamic, kDynamic + 1, kWithoutAttribute}) {
    shim::shared_allowed = 0;
    cuda::launch(declaring, 1, 1, shared, nullptr, &out);
    EXPECT_EQ(shim::shared_allowed, shared > kDynamic ? cuda::shared_limit() : 0);
  }
}

// One row is sorted by cub::DeviceRadixSort, several rows by cub::DeviceSegmentedRadixSort.
TEST(Shim, FailedSortThrows) {
  const int64_t n = 5000, k = 4500;
  for (const int64_t rows : {1, 2}) {
    DeviceArray<float> x(rows * n), values(rows * k);
    DeviceArray<int32_t> indices(rows * k);
    DeviceArray<char> workspace(static_cast<int64_t>(cuda::topk_workspace<float>(n, 1, k, rows)));
    const auto sort = [&] {
      cuda::topk(x.data(), values.data(), indices.data(), n, 1, k, rows, workspace.data(), nullptr);
    };
    shim::sort_error = cudaErrorInvalidValue;
    EXPECT_THROW(sort(), std::runtime_error);
    shim::sort_error = cudaSuccess;
    EXPECT_NO_THROW(sort());
  }
}

__global__ void between_warps(int* out) {
  __shared__ int values[2];
  const unsigned warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) values[warp] = 7;
  __syncwarp();
  out[threadIdx.x] = values[1 - warp];  // __syncthreads is missing before this line
}

TEST(Shim, MissingBarrierOfWarpsChangesTheResult) {
  const shim::Schedule before = shim::schedule;
  std::vector<int> out(64, 0);
  for (const auto schedule : {shim::Schedule::kForward, shim::Schedule::kBackward}) {
    shim::schedule = schedule;
    start(between_warps, 1, 64, out.data());
    EXPECT_EQ(out[0] == 7, schedule == shim::Schedule::kBackward);
    EXPECT_EQ(out[32] == 7, schedule == shim::Schedule::kForward);
  }
  shim::schedule = before;
}

}  // namespace
}  // namespace vmoe
