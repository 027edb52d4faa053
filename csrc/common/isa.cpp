#include "isa.h"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace vmoe::cpu {
namespace {

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

#if defined(__x86_64__)
// Some compilers do not know F16C in __builtin_cpu_supports, so this function reads CPUID. The
// function need not check that the operating system saves the registers, because the check of AVX2
// does.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  // __builtin_cpu_supports also checks that the operating system saves the wide registers.
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c() &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::kV4 : v3 ? Isa::kV3 : Isa::kV2;
#else
  return Isa::kBase;
#endif
}

Isa isa() { return current().load(std::memory_order_relaxed); }

bool use_isa(Isa isa) {
  // A build has either the base level alone or, on x86-64, the levels from v2 on.
  const Isa lowest = best_isa() == Isa::kBase ? Isa::kBase : Isa::kV2;
  if (isa < lowest || isa > best_isa()) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace vmoe::cpu
