// runner -- runs the threads of a block, or of all co-resident blocks, as fibers of one host thread
// (cuda_runtime.h).
//
// Sanitizers instrument the kernels and not this file, which runs at every switch of a fiber. The
// sanitizers are not told about the switches. They check addresses on any stack anyway. If they
// knew the switches, they would only describe an address on the stack of a fiber better.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

#ifdef VMOE_SANITIZE
#include <sanitizer/asan_interface.h>
#else
#define __asan_poison_memory_region(memory, size)
#define __asan_unpoison_memory_region(memory, size)
#endif

// Bounds of the section of __shared__ variables (shared.ld).
extern "C" {
extern uint64_t __start_cuda_shared[];
extern uint64_t __stop_cuda_shared[];
}

namespace shim {
namespace {

constexpr size_t kStack = 256 << 10;
constexpr size_t kLargestShared = 227 << 10;
constexpr uint64_t kCanary = 0x5AFE57AC5AFE57AC;
// The bytes that fill shared memory: kGarbage is an ordinary number, kGarbageNan is NaN if read as
// floating point. An ordinary number may go unnoticed if it is multiplied by 0 or is small in a
// sum.
constexpr unsigned char kGarbage = 0xA5, kGarbageNan = 0xFF;

enum class State { kReady, kBlock, kWarp, kAtomic, kDone };

struct Copy {
  char* to;
  const void* from;
  int group;
};

// The fields that every switch reads come first.
struct alignas(64) Fiber {
  State state = State::kReady;
  bool started = false;
  int lane = 0;
  uint3 index{};
  void* registers[5]{};  // of __builtin_setjmp; [2] is the stack pointer
  // The barrier or warp operation in which the fiber waits.
  WarpOp op{};
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int source = 0;
  const char* barrier = "";
  uint64_t changes = 0;  // the global counter `changes` when the fiber last read an atomic
  // Asynchronous copies that have not been performed yet, oldest first.
  std::deque<Copy> copies;
  int groups = 0;

  std::unique_ptr<char, int (*)(char*)> stack{nullptr, [](char* p) { return munmap(p, kStack); }};
};

struct alignas(128) Dynamic {
  char bytes[kLargestShared];
};

struct Block {
  uint3 index{};
  std::vector<Fiber> fibers;
  std::unique_ptr<Dynamic> dynamic = std::make_unique<Dynamic>();
  std::vector<uint64_t> declared;  // saved __shared__ variables, while another block runs
};

std::vector<Block> blocks;  // co-resident blocks
Block* block = nullptr;     // the running block
Fiber* current = nullptr;
const std::function<void()>* body = nullptr;
size_t block_size = 0;
uint64_t changes = 1;  // 1 + the number of writes to atomics

void* scheduler_registers[5];

const char* name(WarpOp op) {
  constexpr const char* kNames[] = {
      "__syncwarp",        "a shuffle",         "__ballot_sync",
      "__match_any_sync",  "__reduce_min_sync", "__reduce_max_sync",
      "__reduce_add_sync", "__reduce_or_sync",  "a tensor-core instruction"};
  return kNames[static_cast<int>(op)];
}

[[noreturn]] void fail(const char* what) {
  fprintf(
      stderr, "CUDA emulator: %s, in block %u of %u, %zu threads:\n", what, blockIdx.x, gridDim.x,
      block_size);
  for (size_t i = 0; block && i < block_size; ++i) {
    const Fiber& fiber = block->fibers[i];
    fprintf(stderr, "  thread %zu ", i);
    if (fiber.state == State::kBlock) {
      fprintf(stderr, "waits in %s\n", fiber.barrier);
    } else if (fiber.state == State::kWarp) {
      fprintf(stderr, "waits in %s of the lanes %08x\n", name(fiber.op), fiber.mask);
    } else if (fiber.state == State::kAtomic) {
      fprintf(stderr, "waits for an atomic to change\n");
    } else {
      fprintf(stderr, fiber.state == State::kDone ? "has returned\n" : "runs\n");
    }
  }
  abort();
}

// Switches fibers by the setjmp of the compiler, which makes no system call. longjmp of libc may
// reject a jump to another stack. setjmp and longjmp must be in different functions.
__attribute__((noinline, noreturn)) void go(void** to) { __builtin_longjmp(to, 1); }

__attribute__((noinline)) void to_scheduler() {
  if (__builtin_setjmp(current->registers) == 0) go(scheduler_registers);
}

// A fiber runs one thread after another, because starting a fiber takes two system calls.
void run_fiber() {
  while (true) {
    (*body)();
    current->state = State::kDone;
    to_scheduler();
  }
}

__attribute__((noinline)) void enter(Fiber& fiber) {
  if (__builtin_setjmp(scheduler_registers) != 0) return;
  if (fiber.started) go(fiber.registers);
  fiber.started = true;
  ucontext_t start;
  getcontext(&start);
  // Stacks that began at the same offset in a page would share a few sets of the cache.
  const size_t offset = (&fiber - block->fibers.data()) % 32 * 128;
  start.uc_stack.ss_sp = fiber.stack.get();
  start.uc_stack.ss_size = kStack - offset;
  start.uc_link = nullptr;
  makecontext(&start, run_fiber, 0);
  setcontext(&start);
}

void resume(Fiber& fiber) {
  current = &fiber;
  threadIdx = fiber.index;
  enter(fiber);
}

// Performs an operation of the lanes in `mask`, all of which have arrived.
void complete(Fiber* warp, unsigned mask, WarpOp op) {
  const auto taking_part = [&](int lane) { return mask >> lane & 1; };
  if (op == WarpOp::kInstruction) {
    if (mask != 0xFFFFFFFF) fail("a tensor-core instruction without all lanes of a warp");
    WarpInstruction* lanes[32];
    for (int lane = 0; lane < 32; ++lane)
      lanes[lane] = from_bits<WarpInstruction*>(warp[lane].value);
    for (WarpInstruction* lane : lanes) {
      if (lane->run != lanes[0]->run) fail("lanes of a warp are in different instructions");
    }
    lanes[0]->run(lanes);
  }
  uint64_t all = op == WarpOp::kMin ? UINT64_MAX : 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (!taking_part(lane)) continue;
    const uint64_t value = warp[lane].value;
    if (op == WarpOp::kBallot) all |= value << lane;
    if (op == WarpOp::kMin) all = std::min(all, value);
    if (op == WarpOp::kMax) all = std::max(all, value);
    if (op == WarpOp::kAdd) all += value;
    if (op == WarpOp::kOr) all |= value;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (!taking_part(lane)) continue;
    Fiber& fiber = warp[lane];
    fiber.result = all;
    if (op == WarpOp::kShuffle) {
      if (!taking_part(fiber.source)) fail("a shuffle from a lane outside its mask");
      fiber.result = warp[fiber.source].value;
    }
    if (op == WarpOp::kMatch) {
      fiber.result = 0;
      for (int other = 0; other < 32; ++other) {
        if (taking_part(other) && warp[other].value == fiber.value) {
          fiber.result |= uint64_t{1} << other;
        }
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (taking_part(lane)) warp[lane].state = State::kReady;
  }
}

// Whether all lanes of the operation in which `fiber` waits have arrived.
bool is_complete(const Fiber* warp, size_t lanes, const Fiber& fiber) {
  if (lanes < 32 && fiber.mask >> lanes) fail("a mask names lanes that the block does not have");
  for (size_t lane = 0; lane < lanes; ++lane) {
    if (!(fiber.mask >> lane & 1)) continue;
    const Fiber& other = warp[lane];
    if (other.state == State::kDone) fail("a mask names a lane that has returned");
    if (other.state != State::kWarp) return false;
    if (other.op != fiber.op || other.mask != fiber.mask) {
      fail("lanes of one mask are in different operations");
    }
  }
  return true;
}

// Completes the operations of the warp of threads [first, first + 32) whose lanes have all arrived.
void release_warp(size_t first) {
  Fiber* warp = &block->fibers[first];
  const size_t lanes = std::min<size_t>(32, block_size - first);
  for (size_t lane = 0; lane < lanes; ++lane) {
    const Fiber& fiber = warp[lane];
    if (fiber.state == State::kWarp && is_complete(warp, lanes, fiber)) {
      complete(warp, fiber.mask, fiber.op);
    }
  }
}

// Completes the barrier of the block if all threads have arrived.
void release_block() {
  std::vector<Fiber>& fibers = block->fibers;
  size_t at_barrier = 0, done = 0;
  uint64_t sum = 0;
  for (size_t i = 0; i < block_size; ++i) {
    at_barrier += fibers[i].state == State::kBlock;
    done += fibers[i].state == State::kDone;
    sum += fibers[i].value;
  }
  if (at_barrier > 0 && done > 0) fail("a barrier that not all threads of the block reach");
  if (at_barrier < block_size) return;
  for (size_t i = 0; i < block_size; ++i) {
    if (fibers[i].barrier != fibers[0].barrier)
      fail("threads of a block are at different barriers");
    fibers[i].state = State::kReady;
    fibers[i].result = sum;
  }
}

// Fills, saves and restores the __shared__ variables, with the red zones of ASan between them.
// These functions use loops, because ASan would check memset and memcpy.
void fill_declared(uint64_t garbage) {
  for (volatile uint64_t* p = __start_cuda_shared; p < __stop_cuda_shared; ++p) *p = garbage;
}
void save_declared() {
  block->declared.resize(__stop_cuda_shared - __start_cuda_shared);
  uint64_t* to = block->declared.data();
  for (volatile uint64_t* p = __start_cuda_shared; p < __stop_cuda_shared; ++p) *to++ = *p;
}
void restore_declared() {
  const uint64_t* from = block->declared.data();
  for (volatile uint64_t* p = __start_cuda_shared; p < __stop_cuda_shared; ++p) *p = *from++;
}

void fill_shared(size_t size) {
  const unsigned char garbage = schedule == Schedule::kForward ? kGarbage : kGarbageNan;
  fill_declared(garbage * uint64_t{0x0101010101010101});
  char* dynamic = block->dynamic->bytes;
  __asan_unpoison_memory_region(dynamic, kLargestShared);
  memset(dynamic, garbage, size);
  __asan_poison_memory_region(dynamic + size, kLargestShared - size);
}

void prepare(Fiber& fiber, size_t i) {
  if (!fiber.stack) {
    void* memory =
        mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for stacks");
    fiber.stack.reset(static_cast<char*>(memory));
    memcpy(fiber.stack.get(), &kCanary, sizeof(kCanary));
  }
  fiber.state = State::kReady;
  fiber.changes = 0;
  fiber.copies.clear();
  fiber.groups = 0;
  fiber.lane = static_cast<int>(i % 32);
  const auto x = static_cast<unsigned>(i);
  fiber.index = {x % blockDim.x, x / blockDim.x % blockDim.y, x / blockDim.x / blockDim.y};
}

bool is_out_of_bounds([[maybe_unused]] const void* memory, [[maybe_unused]] size_t size) {
#ifdef VMOE_SANITIZE
  return __asan_region_is_poisoned(const_cast<void*>(memory), size);
#else
  return false;
#endif
}

void perform(const Copy& copy) {
  if (is_out_of_bounds(copy.to, 16)) fail("an asynchronous copy to a bad address");
  if (copy.from) {
    if (is_out_of_bounds(copy.from, 16)) fail("an asynchronous copy from a bad address");
    memcpy(copy.to, copy.from, 16);
  } else {
    memset(copy.to, 0, 16);
  }
}

// The order in which the scheduler resumes threads or blocks.
class Order {
 public:
  explicit Order(size_t size) : order_(size) {
    for (size_t i = 0; i < size; ++i) {
      order_[i] = schedule == Schedule::kBackward ? size - 1 - i : i;
      if (i == 0 || order_[i] / 32 != warps_.back().front() / 32) warps_.emplace_back();
      warps_.back().push_back(order_[i]);
    }
  }
  const std::vector<size_t>& next() {
    if (schedule == Schedule::kShuffled) std::shuffle(order_.begin(), order_.end(), random_);
    return order_;
  }
  // The first order of the threads, divided into warps.
  const std::vector<std::vector<size_t>>& warps() const { return warps_; }

 private:
  std::vector<size_t> order_;
  std::vector<std::vector<size_t>> warps_;
  std::mt19937 random_{1};
};

void enter_block(Block& next) {
  block = &next;
  blockIdx = next.index;
}

void begin_block(Block& next, size_t i, size_t shared) {
  const auto x = static_cast<unsigned>(i);
  next.index = {x % gridDim.x, x / gridDim.x % gridDim.y, x / gridDim.x / gridDim.y};
  if (next.fibers.size() < block_size) next.fibers.resize(block_size);
  enter_block(next);
  fill_shared(shared);
  for (size_t i = 0; i < block_size; ++i) prepare(next.fibers[i], i);
}

// Resumes the threads of the block that need not wait. Returns whether there was such a thread. In
// the schedules forward and backward, each warp runs as far as it can before the next warp, which
// reveals missing barriers. In the schedule shuffled, every thread is resumed once.
bool run_block(Order& order) {
  std::vector<Fiber>& fibers = block->fibers;
  const auto may_go_on = [](const Fiber& fiber) {
    return fiber.state == State::kReady ||
           (fiber.state == State::kAtomic && fiber.changes != changes);
  };
  const auto resume_all = [&](const std::vector<size_t>& order) {
    bool any = false;
    for (auto i = order.begin(); i != order.end(); ++i) {
      if (i + 1 != order.end()) {  // prefetch the next stack: hardware does not predict it
        const char* next = static_cast<const char*>(fibers[i[1]].registers[2]);
        __builtin_prefetch(next);
        __builtin_prefetch(next + 64);
      }
      if (!may_go_on(fibers[*i])) continue;
      any = true;
      resume(fibers[*i]);
    }
    return any;
  };
  bool any = false;
  if (schedule == Schedule::kShuffled) {
    any = resume_all(order.next());
    for (size_t first = 0; first < block_size; first += 32) release_warp(first);
  } else {
    for (const std::vector<size_t>& warp : order.warps()) {
      while (resume_all(warp)) {
        any = true;
        release_warp(*std::min_element(warp.begin(), warp.end()));
      }
    }
  }
  release_block();
  return any;
}

void end_block() {
  const std::vector<Fiber>& fibers = block->fibers;
  for (size_t i = 0; i < block_size; ++i) {
    if (fibers[i].state != State::kDone) fail("a deadlock: no thread can continue");
    if (!fibers[i].copies.empty()) fail("a thread returned without waiting for its copies");
    if (memcmp(fibers[i].stack.get(), &kCanary, sizeof(kCanary)) != 0) fail("a stack overflow");
  }
}

}  // namespace

void run(
    dim3 grid, dim3 threads, size_t shared, bool cooperative, const std::function<void()>& thread) {
  const size_t grid_size = size_t{grid.x} * grid.y * grid.z;
  block = nullptr;
  block_size = size_t{threads.x} * threads.y * threads.z;
  gridDim = grid;
  blockDim = threads;
  if (block_size == 0 || block_size > 1024) fail("a block of 0 threads or more than 1024");
  if (grid_size == 0) fail("a grid without blocks");
  if (grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) fail("a grid with too many blocks");
  if (shared > shared_limit) fail("more shared memory than a block may have");
  if (cooperative && grid_size > static_cast<size_t>(multiprocessors)) {
    fail("a cooperative launch with more blocks than multiprocessors");
  }
  body = &thread;
  blocks.resize(std::max(blocks.size(), cooperative ? grid_size : 1));
  Order in_block(block_size), in_grid(grid_size);
  if (!cooperative) {
    for (const size_t i : in_grid.next()) {
      begin_block(blocks[0], i, shared);
      while (run_block(in_block)) {
      }
      end_block();
    }
    return;
  }
  for (size_t i = 0; i < grid_size; ++i) {
    begin_block(blocks[i], i, shared);
    save_declared();
  }
  bool any = true;
  while (any) {
    any = false;
    for (const size_t i : in_grid.next()) {
      enter_block(blocks[i]);
      restore_declared();
      // In the schedules forward and backward, a block runs as far as it can before the next block
      // runs.
      while (run_block(in_block)) {
        any = true;
        if (schedule == Schedule::kShuffled) break;
      }
      save_declared();
    }
  }
  for (size_t i = 0; i < grid_size; ++i) {
    enter_block(blocks[i]);
    end_block();
  }
}

void* dynamic_shared() { return block->dynamic->bytes; }

int lane() { return current->lane; }

void before_atomic_read() {
  if (current->changes == changes) {
    current->state = State::kAtomic;
    to_scheduler();
    current->state = State::kReady;
  }
  current->changes = changes;
}

void after_atomic_write() { ++changes; }

int wait_for_block(const char* barrier, int value) {
  current->state = State::kBlock;
  current->barrier = barrier;
  current->value = static_cast<uint64_t>(value);
  to_scheduler();
  return static_cast<int>(current->result);
}

uint64_t wait_for_warp(WarpOp op, unsigned mask, uint64_t value, int source) {
  current->state = State::kWarp;
  current->op = op;
  current->mask = mask;
  current->value = value;
  current->source = source;
  if (!(mask >> lane() & 1)) fail("a mask without the calling lane");
  to_scheduler();
  return current->result;
}

void check_alignment(const void* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16 != 0) fail("a misaligned access of 16 bytes");
}

void copy_async(char* to, const void* from, bool valid) {
  static std::mt19937 random{1};
  check_alignment(to);
  check_alignment(from);
  const Copy copy{to, valid ? from : nullptr, current->groups};
  const bool late =
      schedule == Schedule::kForward || (schedule == Schedule::kShuffled && random() % 2 == 0);
  late ? current->copies.push_back(copy) : perform(copy);
}

void commit_copies() { ++current->groups; }

void await_copies(int pending) {
  std::deque<Copy>& copies = current->copies;
  while (!copies.empty() && copies.front().group < current->groups - pending) {
    perform(copies.front());
    copies.pop_front();
  }
}

void execute(WarpInstruction* mine) {
  wait_for_warp(WarpOp::kInstruction, 0xFFFFFFFF, to_bits(mine), 0);
}

}  // namespace shim
