// soft_logits -- the logits of Soft MoE: products of normalised tokens and slot parameters.
//
//   x       [G, T, D]  float32 | float64; on CUDA also bfloat16 | float16
//   phi     [D, S]     float32, for float64 tokens float64   the slots' parameters, normalised and
//                                                            scaled by the caller
//   logits  [G, T, S]  phi's dtype   r[g, t] <x[g, t], phi[:, s]>,  r = 1 / sqrt(|x|^2 + 1e-6)
//
// (Puigcerver et al., arXiv 2308.00951, section 2.3.) The rows of the product x phi are scaled by r
// instead of the tokens, so neither the forward nor the backward needs a normalised copy of the
// tokens. The product is computed by cpu/product.cpp on a CPU, and by torch on CUDA. |x|^2 is
// summed in float64, so that the sum does not overflow if the entries of x are large.
//
// Gradient: with P = r * grad,  grad_phi = sum_g x^T P,  U = P phi^T,
// grad_x = U - x r^2 <x, U>.
//
// 16-bit tokens are multiplied in 16 bits, with sums in float32. phi is then float32. It is split
// into two parts, phi = high + low, each rounded to the dtype of the tokens. The sum of the two
// parts has a relative error of at most 2^-16. (TF32 has 2^-11.) For the gradients, P and phi are
// rounded once to the dtype of the tokens: the gradient of x is rounded to that dtype anyway, and
// the gradient of phi is a sum over all tokens. In float16, entries of phi beyond 65504 overflow.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    // scaled = r * products, row by row. `scaled` and `products` may be the same memory.
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
        T* grad,     // [rows, D]  in: U; out: gradient of x
        int64_t D,
        int64_t row_begin,
        int64_t row_end);

)

VMOE_BY_ISA(soft_logits)
VMOE_BY_ISA(soft_logits_backward)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// Splits phi into two parts for 16-bit tokens. Rows of both parts are padded with zeros.
template <typename Row>
void soft_logits_parts(
    const Compute<Row>* phi,  // [D, S]
    Row* parts,               // [D, 2, row_stride<Row>(S)]  (common/row_stride.h)
    int64_t D,
    int64_t S,
    CUstream_st* stream);

// logits = r * products, row by row. For 16-bit x there are two products, one per part of phi.
// Their sum is scaled.
template <typename Row>
void soft_logits(
    const Row* x,                  // [rows, D]
    const Compute<Row>* products,  // [rows, S], or [rows, 2, row_stride<Row>(S)]
    Compute<Row>* logits,          // [rows, S]  may be products [rows, S]
    int64_t D,
    int64_t S,
    int64_t rows,
    CUstream_st* stream);

// scaled = P = r * grad, in the dtype of x. Columns from S on are padding.
template <typename Row>
void soft_logits_scaled(
    const Row* x,              // [rows, D]
    const Compute<Row>* grad,  // [rows, S]
    Row* scaled,               // [rows, row_stride<Row>(S)]
    int64_t D,
    int64_t S,
    int64_t rows,
    CUstream_st* stream);

template <typename Row>
void soft_logits_backward(
    const Row* x,  // [rows, D]
    Row* grad,     // [rows, D]  in: U; out: gradient of x
    int64_t D,
    int64_t rows,
    CUstream_st* stream);

}  // namespace vmoe::cuda
