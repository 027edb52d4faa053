// slots -- the sizes of a routing, and the rows of its slots. Index tensors number slots in the
// order [G, E, C]. The rows of slots are stored in the order [E, G, C].
#pragma once

#include <cstdint>

#include "order.h"

namespace vmoe {

// The row of slot s = e * C + c of group g. Slots fit in 32 bits.
VMOE_HOST_DEVICE inline int64_t row_of_slot(int64_t g, int64_t s, int64_t G, int64_t C) {
  const int64_t e = static_cast<uint32_t>(s) / static_cast<uint32_t>(C);
  return (e * G + g) * C + (s - e * C);
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
  // Divisions of 64 bits are slow on a GPU, so row numbers are divided in 32 bits if they fit.
  VMOE_HOST_DEVICE SlotRow at(int64_t row) const {
    return all() <= UINT32_MAX ? at(static_cast<uint32_t>(row), static_cast<uint32_t>(G * C),
                                    static_cast<uint32_t>(C))
                               : at(row, G * C, C);
  }

 private:
  template <typename Index>
  VMOE_HOST_DEVICE SlotRow at(Index row, Index rows_of_expert, Index slots_of_group) const {
    const Index e = row / rows_of_expert, rest = row - e * rows_of_expert;
    const Index g = rest / slots_of_group;
    return {int64_t{g}, (int64_t{g} * E + e) * C + (rest - g * slots_of_group)};
  }
};

}  // namespace vmoe
