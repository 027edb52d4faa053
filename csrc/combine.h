// combine -- for every token, the sum of the expert outputs in its slots, weighted by gates.
//
//   y        [E, G, C, D]  float16 | bfloat16 | float32 | float64
//   gate     [G, E, C]     Compute<y's dtype> (common/half.h), or null: all 1
//   offsets  [G, T + 1]    int32   of invert_slots
//   slots    [G, E * C]    int32   of invert_slots
//   out      [G, T, D]     y's dtype   out[g, t] = sum over the slots s of t: gate[g, s] y[s]
//
// Offsets are clamped to [0, E * C]. Slots outside [0, E * C) are skipped. So no value in `offsets`
// or `slots` causes a read outside y and gate.
//
// In arXiv 2401.15969, section 3, combine is Y = B Y~ with B = D * gate, where D is the 0/1 matrix
// of dispatch.h. A token without a slot gets zeros. Slots are added in ascending order, so the sum
// is deterministic. A 16-bit result is rounded once.
//
// Gradient, with the tokens [G, E, C] of dispatch.h: grad_y[s] = gate[s] grad_out[token[s]],
// grad_gate[s] = <grad_out[token[s]], y[s]>, both zero for an empty slot.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"
#include "common/slots.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename Row> void combine(
        const Row* y,              // [E, G, C, D]
        const Compute<Row>* gate,  // [G, E, C] or null
        const int32_t* offsets,    // [G, T + 1]
        const int32_t* slots,      // [G, E * C]
        Row* out,                  // [G, T, D]
        const Slots& shape,
        int64_t D,
        int64_t row_begin,  // rows [row_begin, row_end) of the G * T rows of out
        int64_t row_end);

    template <typename Row>
    void combine_backward(
        const Row* grad_out,       // [G, T, D]
        const Row* y,              // [E, G, C, D]
        const Compute<Row>* gate,  // [G, E, C]
        const int32_t* token,      // [G, E, C]
        Row* grad_y,               // [E, G, C, D]
        Compute<Row>* grad_gate,   // [G, E, C]
        const Slots& shape,
        int64_t D,
        int64_t row_begin,  // rows [row_begin, row_end) of the E * G * C rows of grad_y
        int64_t row_end);

)

VMOE_BY_ISA(combine)
VMOE_BY_ISA(combine_backward)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

template <typename Row>
void combine(
    const Row* y,              // [E, G, C, D]
    const Compute<Row>* gate,  // [G, E, C] or null
    const int32_t* offsets,    // [G, T + 1]
    const int32_t* slots,      // [G, E * C]
    Row* out,                  // [G, T, D]
    const Slots& shape,
    int64_t D,
    CUstream_st* stream);

template <typename Row>
void combine_backward(
    const Row* grad_out,       // [G, T, D]
    const Row* y,              // [E, G, C, D]
    const Compute<Row>* gate,  // [G, E, C]
    const int32_t* token,      // [G, E, C]
    Row* grad_y,               // [E, G, C, D]
    Compute<Row>* grad_gate,   // [G, E, C]
    const Slots& shape,
    int64_t D,
    CUstream_st* stream);

}  // namespace vmoe::cuda
