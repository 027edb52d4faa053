// slot_row -- where a slot's row lies: slots are [G, E, C], their rows [E, G, C].
#pragma once

#include <cstdint>

#include "order.h"

namespace vmoe {

struct SlotRow {
  int64_t group;
  int64_t slot;  // in [G, E, C], flat
};

VMOE_HOST_DEVICE inline SlotRow slot_of_row(int64_t row, int64_t G, int64_t E, int64_t C) {
  const int64_t e = row / (G * C), g = row / C % G;
  return {g, (g * E + e) * C + row % C};
}

// Row of slot `s` (e * C + c) of group `g`.
VMOE_HOST_DEVICE inline int64_t row_of_slot(int64_t g, int64_t s, int64_t G, int64_t C) {
  return (s / C * G + g) * C + s % C;
}

}  // namespace vmoe
