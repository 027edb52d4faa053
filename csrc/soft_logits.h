// soft_logits -- the logits of Soft MoE: products of tokens of length 1.
//
//   x       [G, T, D]  float32 | float64
//   phi     [D, S]     same dtype   the slots' parameters, normalised and scaled by the caller
//   logits  [G, T, S]  r[g, t] <x[g, t], phi[:, s]>,  r = 1 / sqrt(|x|^2 + 1e-6)
//
// (Puigcerver et al., arXiv 2308.00951, section 2.3.) The product is torch's, of the tokens
// as they are; normalising its rows instead of them leaves no second copy of the tokens,
// neither here nor for backward. |x|^2 is summed in float64: no token is too long.
//
// Gradient: with P = r * grad,  grad_phi = sum_g x^T P,  U = P phi^T,
// grad_x = U - x r^2 <x, U>.
#pragma once

#include <cstdint>

#include "isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    // scaled = r * products, row by row; may be the same memory.
    template <typename T> void soft_logits(
        const T* x,         // [rows, D]
        const T* products,  // [rows, S]
        T* scaled,          // [rows, S]
        int64_t D,
        int64_t S,
        int64_t row_begin,
        int64_t row_end);

    template <typename T>
    void soft_logits_backward(
        const T* x,  // [rows, D]
        T* grad,     // [rows, D]  in: U; out: of x
        int64_t D,
        int64_t row_begin,
        int64_t row_end);

)

VMOE_BY_ISA(soft_logits)
VMOE_BY_ISA(soft_logits_backward)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

template <typename T>
void soft_logits(
    const T* x,         // [rows, D]
    const T* products,  // [rows, S]
    T* scaled,          // [rows, S]  may be products
    int64_t D,
    int64_t S,
    int64_t rows,
    CUstream_st* stream);

template <typename T>
void soft_logits_backward(
    const T* x,  // [rows, D]
    T* grad,     // [rows, D]  in: U; out: of x
    int64_t D,
    int64_t rows,
    CUstream_st* stream);

}  // namespace vmoe::cuda
