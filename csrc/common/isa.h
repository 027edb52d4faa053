// isa -- compiles every CPU kernel once per ISA level, and chooses a level at run time.
//
// csrc/cpu/<op>.cpp is compiled once per level, each time into another namespace: cpu::v2, cpu::v3
// and cpu::v4 (the x86-64 levels), or cpu::base on other CPUs. A contract declares each kernel in
// all of these namespaces. The contract also declares a function of the same name in cpu. This
// function calls the kernel of the level in use:
//
//   VMOE_EACH_ISA(template <typename T> void topk(const T* x, ...);)
//   VMOE_BY_ISA(topk)
//
// Callers write cpu::topk(...).
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

// base: the default target of the compiler, on CPUs other than x86-64. v2: SSE4.2. v3: AVX2, FMA,
// F16C, BMI1 and BMI2. v4: AVX-512 F, BW, CD, DQ and VL.
enum class Isa { kBase, kV2, kV3, kV4 };

// The level in use: best_isa(), unless use_isa lowered it.
Isa isa();

// The best level that this CPU supports and the build contains.
Isa best_isa();

// Sets the level for all threads (for tests and benchmarks). If this CPU or this build lacks the
// level, use_isa changes nothing and returns false.
bool use_isa(Isa isa);

}  // namespace vmoe::cpu
