// dispatch -- copies the rows of tokens into slots.
//
//   x      [G, T, D]     any dtype
//   token  [G, E, C]     int32       token that a slot holds; outside [0, T): empty
//   out    [E, G, C, D]  same dtype  out[e, g, c] = x[g, token[g, e, c]]; empty slots are zeros
//
// In arXiv 2401.15969, section 3, dispatch is X~ = D^T X, where D is a 0/1 matrix. Experts are the
// first axis of `out`, so that the rows of one expert form one matrix for its MLP. Copies are exact
// to the bit for every dtype.
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
        int64_t row_begin,  // rows [row_begin, row_end) of the E * G * C rows of out
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
