// dispatch -- the rows of the tokens, laid out by slot.
//
//   x      [G, T, D]     any dtype
//   token  [G, E, C]     int32       token that a slot holds; outside [0, T): empty
//   out    [E, G, C, D]  same dtype  out[e, g, c] = x[g, token[g, e, c]], zeros where empty
//
// X~ = D^T X of the paper's formulation, for a 0/1 D (section 3 of arXiv 2401.15969).
// The expert comes first in memory: the rows of one expert are one matrix for its MLP.
// Bit-exact copies, whatever the dtype.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/slots.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    void dispatch(
        const char* x,         // [G, T, row_bytes]
        const int32_t* token,  // [G, E, C]
        char* out,             // [E, G, C, row_bytes]
        const Slots& shape,
        int64_t row_bytes,
        int64_t row_begin,  // rows of out, [row_begin, row_end) of E * G * C
        int64_t row_end);

)

VMOE_BY_ISA(dispatch)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

void dispatch(
    const char* x,         // [G, T, row_bytes]
    const int32_t* token,  // [G, E, C]
    char* out,             // [E, G, C, row_bytes]
    const Slots& shape,
    int64_t row_bytes,
    CUstream_st* stream);

}  // namespace vmoe::cuda
