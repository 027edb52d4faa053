// isa -- every CPU kernel compiled once per ISA level, one of them chosen at run time.
//
// csrc/cpu/<op>.cpp is compiled for each level into a namespace of its own, cpu::v2,
// cpu::v3 and cpu::v4 (the x86-64 levels), or cpu::base elsewhere. A contract declares its
// kernels in all of them, and under their plain name one that goes to the level in use:
//
//   VMOE_EACH_ISA(template <typename T> void topk(const T* x, ...);)
//   VMOE_BY_ISA(topk)
//
// Code behind it is found by cpu::topk(...).
#pragma once

#include <utility>

#if defined(__x86_64__)
#define VMOE_EACH_ISA(...)                                                                         \
  namespace v2 {                                                                                   \
  __VA_ARGS__                                                                                      \
  }                                                                                                \
  namespace v3 {                                                                                   \
  __VA_ARGS__                                                                                      \
  }                                                                                                \
  namespace v4 {                                                                                   \
  __VA_ARGS__                                                                                      \
  }
#define VMOE_BY_ISA(kernel)                                                                        \
  template <typename... Args>                                                                      \
  void kernel(Args... args) {                                                                      \
    switch (isa()) {                                                                               \
      case Isa::kV4:                                                                               \
        return v4::kernel(args...);                                                                \
      case Isa::kV3:                                                                               \
        return v3::kernel(args...);                                                                \
      default:                                                                                     \
        return v2::kernel(args...);                                                                \
    }                                                                                              \
  }
#else
#define VMOE_EACH_ISA(...)                                                                         \
  namespace base {                                                                                 \
  __VA_ARGS__                                                                                      \
  }
#define VMOE_BY_ISA(kernel)                                                                        \
  template <typename... Args>                                                                      \
  void kernel(Args... args) {                                                                      \
    return base::kernel(args...);                                                                  \
  }
#endif

namespace vmoe::cpu {

// base: whatever the compiler was told (arm64, ...). v2: SSE4.2, v3: AVX2, FMA and
// F16C, v4: AVX-512 F, BW, CD, DQ and VL.
enum class Isa { kBase, kV2, kV3, kV4 };

// The level in use: the best that this CPU has and the build contains, unless lowered.
Isa isa();

// The best level that could be used.
Isa best_isa();

// For tests and benchmarks: uses another level from now on, for every thread. False,
// and nothing changed, where it cannot run here.
bool use_isa(Isa isa);

}  // namespace vmoe::cpu
