#include "../combine.h"

#include <algorithm>

#include "../slot_row.h"

namespace vmoe::cpu::VMOE_ISA {

template <typename T>
void combine(
    const T* y, const T* gate, const int32_t* offsets, const int32_t* slots, T* out, int64_t G,
    int64_t tokens, int64_t E, int64_t C, int64_t D, int64_t row_begin, int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int64_t g = row / tokens, t = row % tokens;
    const int32_t* start = offsets + g * (tokens + 1) + t;
    T* sum = out + row * D;
    std::fill(sum, sum + D, T{0});
    for (int32_t i = start[0]; i < start[1]; ++i) {
      const int64_t s = slots[g * E * C + i];
      const T weight = gate ? gate[g * E * C + s] : T{1};
      const T* from = y + row_of_slot(g, s, G, C) * D;
      for (int64_t d = 0; d < D; ++d) sum[d] += weight * from[d];
    }
  }
}

template <typename T>
void combine_backward(
    const T* grad_out, const T* y, const T* gate, const int32_t* token, T* grad_y, T* grad_gate,
    int64_t G, int64_t tokens, int64_t E, int64_t C, int64_t D, int64_t row_begin,
    int64_t row_end) {
  for (int64_t row = row_begin; row < row_end; ++row) {
    const SlotRow at = slot_of_row(row, G, E, C);
    const int32_t t = token[at.slot];
    T* to = grad_y + row * D;
    if (t < 0 || t >= tokens) {
      std::fill(to, to + D, T{0});
      grad_gate[at.slot] = T{0};
      continue;
    }
    const T* from = grad_out + (at.group * tokens + t) * D;
    const T weight = gate[at.slot];
    T dot = 0;
    for (int64_t d = 0; d < D; ++d) {
      to[d] = weight * from[d];
      dot += from[d] * y[row * D + d];
    }
    grad_gate[at.slot] = dot;
  }
}

#define VMOE_INSTANTIATE(T)                                                                        \
  template void combine(                                                                           \
      const T*, const T*, const int32_t*, const int32_t*, T*, int64_t, int64_t, int64_t, int64_t,  \
      int64_t, int64_t, int64_t);                                                                  \
  template void combine_backward(                                                                  \
      const T*, const T*, const T*, const int32_t*, T*, T*, int64_t, int64_t, int64_t, int64_t,    \
      int64_t, int64_t, int64_t);
VMOE_INSTANTIATE(float)
VMOE_INSTANTIATE(double)
#undef VMOE_INSTANTIATE

}  // namespace vmoe::cpu::VMOE_ISA
