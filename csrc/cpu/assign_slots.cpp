#include "../assign_slots.h"

#include "select.h"

namespace vmoe::cpu::VMOE_ISA {

template <typename T>
void assign_slots(
    const int32_t* expert, const T* priority, int32_t* slot, int32_t* source, const Slots& shape,
    int64_t K, int64_t group_begin, int64_t group_end) {
  const auto [_, tokens, E, C] = shape;
  std::vector<int64_t> taken(E);
  std::vector<Pick<OrderKey<T>>> order;
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int32_t* wanted = expert + g * tokens * K;
    int32_t* place = slot + g * tokens * K;
    int32_t* holder = source + g * E * C;
    std::fill(holder, holder + E * C, -1);
    std::fill(taken.begin(), taken.end(), 0);
    if (priority) sort_all(priority + g * tokens, tokens, order);
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t i = 0; i < tokens; ++i) {
        const int64_t request = (priority ? order[i].index : i) * K + k;
        const int32_t e = wanted[request];
        place[request] = -1;
        if (e < 0 || e >= E || taken[e] == C) continue;
        place[request] = static_cast<int32_t>(e * C + taken[e]++);
        holder[place[request]] = static_cast<int32_t>(request);
      }
    }
  }
}

template void assign_slots(
    const int32_t*, const float*, int32_t*, int32_t*, const Slots&, int64_t, int64_t, int64_t);
template void assign_slots(
    const int32_t*, const double*, int32_t*, int32_t*, const Slots&, int64_t, int64_t, int64_t);

}  // namespace vmoe::cpu::VMOE_ISA
