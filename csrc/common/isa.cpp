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
// Not every compiler's __builtin_cpu_supports knows it. Its registers are AVX's.
bool has_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  // These ask the operating system too, which must save the wide registers.
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
  // Base is the only level of its build; x86-64 builds begin at v2.
  const Isa lowest = best_isa() == Isa::kBase ? Isa::kBase : Isa::kV2;
  if (isa < lowest || isa > best_isa()) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace vmoe::cpu
