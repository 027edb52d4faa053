// invert_slots -- the slots of every token, from the token of every slot.
//
//   token    [G, E, C]   int32   token that a slot holds; outside [0, T): empty
//   offsets  [G, T + 1]  int32   the slots of token t are slots[offsets[t], offsets[t + 1])
//   slots    [G, E * C]  int32   slots by token, ascending within a token; -1 after the last
//   filled   [G, E]      int32   1 + the position of an expert's last slot that is not empty, or 0
//
// With the maps from slots to tokens and from tokens to slots, the forward and backward of dispatch
// and combine are gathers. Gathers need no atomics and no zero fill, and sum in a fixed order. The
// result is deterministic. The cost per group is O(E * C + T).
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "common/slots.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    void invert_slots(
        const int32_t* token,  // [G, E, C]
        int32_t* offsets,      // [G, T + 1]
        int32_t* slots,        // [G, E * C]
        int32_t* filled,       // [G, E]
        const Slots& shape,
        int64_t group_begin,
        int64_t group_end);

)

VMOE_BY_ISA(invert_slots)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// Bytes of workspace that invert_slots needs.
size_t invert_slots_workspace(const Slots& shape);

void invert_slots(
    const int32_t* token,  // [G, E, C]
    int32_t* offsets,      // [G, T + 1]
    int32_t* slots,        // [G, E * C]
    int32_t* filled,       // [G, E] or null
    const Slots& shape,
    void* workspace,  // invert_slots_workspace bytes
    CUstream_st* stream);

}  // namespace vmoe::cuda
