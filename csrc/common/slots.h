// slots -- the sizes of a routing, and the rows of its slots. Index tensors number slots in the
// order [G, E, C]. The rows of slots are stored in the order [E, G, C].
#pragma once

#include <cstdint>

#include "order.h"

namespace vmoe {

// The row of slot s = e * C + c of group g.
VMOE_HOST_DEVICE inline int64_t row_of_slot(int64_t g, int64_t s, int64_t G, int64_t C) {
  return (s / C * G + g) * C + s % C;
}

// The slot that is stored in a row.
struct SlotRow {
  int64_t group;
  int64_t slot;  // (g * E + e) * C + c
};

struct Slots {
  int64_t G, tokens, E, C;  // groups, tokens per group, experts, slots per expert and group

  VMOE_HOST_DEVICE int64_t of_group() const { return E * C; }  // slots per group
  VMOE_HOST_DEVICE int64_t all() const { return G * E * C; }
  VMOE_HOST_DEVICE int64_t all_tokens() const { return G * tokens; }

  VMOE_HOST_DEVICE int64_t row(int64_t g, int64_t s) const { return row_of_slot(g, s, G, C); }
  VMOE_HOST_DEVICE SlotRow at(int64_t row) const {
    const int64_t e = row / (G * C), g = row / C % G;
    return {g, (g * E + e) * C + row % C};
  }
};

}  // namespace vmoe
