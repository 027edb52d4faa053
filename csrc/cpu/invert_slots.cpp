#include "../invert_slots.h"

#include <algorithm>
#include <vector>

namespace vmoe::cpu::VMOE_ISA {

void invert_slots(
    const int32_t* token, int32_t* offsets, int32_t* slots, int32_t* filled, const Slots& shape,
    int64_t group_begin, int64_t group_end) {
  const int64_t tokens = shape.tokens, E = shape.E, C = shape.C, S = E * C;
  std::vector<int32_t> next(tokens);
  for (int64_t g = group_begin; g < group_end; ++g) {
    const int32_t* holds = token + g * S;
    int32_t* start = offsets + g * (tokens + 1);
    int32_t* sorted = slots + g * S;
    const auto is_filled = [&](int64_t s) { return holds[s] >= 0 && holds[s] < tokens; };
    // A counting sort is stable, so the slots of a token stay in ascending order.
    std::fill(start, start + tokens + 1, 0);
    for (int64_t e = 0; e < E; ++e) {
      int64_t last = 0;
      for (int64_t c = 0; c < C; ++c) {
        if (!is_filled(e * C + c)) continue;
        ++start[holds[e * C + c] + 1];
        last = c + 1;
      }
      filled[g * E + e] = static_cast<int32_t>(last);
    }
    for (int64_t t = 0; t < tokens; ++t) start[t + 1] += start[t];
    std::copy(start, start + tokens, next.begin());
    for (int64_t s = 0; s < S; ++s) {
      if (is_filled(s)) sorted[next[holds[s]]++] = static_cast<int32_t>(s);
    }
    std::fill(sorted + start[tokens], sorted + S, -1);
  }
}

}  // namespace vmoe::cpu::VMOE_ISA
