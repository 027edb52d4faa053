// invert_slots -- from "the token of a slot" to "the slots of a token".
//
//   token    [G, S]      int32   token that a slot holds, in [0, T); anything else: empty
//   offsets  [G, T + 1]  int32   the slots of token t are slots[offsets[t], offsets[t + 1])
//   slots    [G, S]      int32   slots by token, ascending within a token; -1 behind the last
//
// With both directions at hand, forward and backward of dispatch and combine are
// gathers: no atomics, no zero fill, one order of summation.
// Deterministic. O(S + T) a group.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    void invert_slots(
        const int32_t* token,  // [G, S]
        int32_t* offsets,      // [G, T + 1]
        int32_t* slots,        // [G, S]
        int64_t S,
        int64_t tokens,
        int64_t group_begin,
        int64_t group_end);

)

VMOE_BY_ISA(invert_slots)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// Bytes of workspace that invert_slots asks for.
size_t invert_slots_workspace(int64_t G, int64_t S, int64_t tokens);

void invert_slots(
    const int32_t* token,  // [G, S]
    int32_t* offsets,      // [G, T + 1]
    int32_t* slots,        // [G, S]
    int64_t G,
    int64_t S,
    int64_t tokens,
    void* workspace,  // of invert_slots_workspace
    CUstream_st* stream);

}  // namespace vmoe::cuda
