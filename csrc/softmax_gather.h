// softmax_gather -- gates, the softmax over the experts, at chosen positions.
//
//   logits   [G, T, E]                  float32 | float64
//   indices  [G, T, K] or [G, E, C]     int32       experts of every token (dim 2), or tokens
//                                                   of every expert (dim 1)
//   values   like indices, logits' dtype            gate of that token and expert
//   norms    [2, G, T]                  same dtype   for the backward: largest logit of the token,
//                                                   and 1 over its sum of exponentials
//
//   gate[t, e] = exp(logits[t, e] - norms[0, t]) * norms[1, t]
//
// An index outside of the axis has the value 0 and no gradient. A token whose logits are all -inf
// is masked: its norms and gates are 0. A token with NaN or +inf has NaN gates. The bits of a
// token's gates depend only on its own logits. softmax_topk computes the same bits.
//
// Gradient, where d[t, e] is the sum of the gradients of the values gathered from gate[t, e]:
// grad_logits = gate (d - sum_e gate d). The gates are computed again from logits and norms.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename T> void softmax_norms(
        const T* logits,  // [tokens, E]
        T* high,          // [tokens]  norms[0]
        T* scale,         // [tokens]  norms[1]
        int64_t E,
        int64_t begin,  // tokens [begin, end)
        int64_t end);

    template <typename T>
    void softmax_gather(
        const T* logits,         // [G, T, E]
        const int32_t* indices,  // [G, T, K], or by expert [G, E, K]
        const T* high,           // [G, T]
        const T* scale,          // [G, T]
        T* values,               // shape of indices
        int64_t tokens,
        int64_t E,
        int64_t K,
        bool by_expert,
        int64_t row_begin,  // rows [row_begin, row_end) of the G * T or G * E rows of indices
        int64_t row_end);

    // The three steps of the backward.
    template <typename T>
    void softmax_dots(
        const T* grad,           // shape of indices
        const T* values,         // shape of indices
        const int32_t* indices,  // [G, T, K], or by expert [G, E, K]
        T* dots,                 // [G, T]  += sum of a token's grad * value
        int64_t tokens,
        int64_t E,
        int64_t K,
        bool by_expert,
        int64_t row_begin,  // as in softmax_gather; by expert only whole groups
        int64_t row_end);

    template <typename T>
    void softmax_gather_backward(
        const T* logits,  // [tokens, E]
        const T* high,    // [tokens]
        const T* scale,   // [tokens]
        const T* dots,    // [tokens]
        T* grad_logits,   // [tokens, E]  -dots * gates
        int64_t E,
        int64_t begin,  // tokens [begin, end)
        int64_t end);

    template <typename T>
    void softmax_scatter(
        const T* grad,           // shape of indices
        const T* values,         // shape of indices
        const int32_t* indices,  // [G, T, K], or by expert [G, E, K]
        T* grad_logits,          // [G, T, E]  += grad * value
        int64_t tokens,
        int64_t E,
        int64_t K,
        bool by_expert,
        int64_t row_begin,  // as in softmax_gather
        int64_t row_end);

)

VMOE_BY_ISA(softmax_norms)
VMOE_BY_ISA(softmax_gather)
VMOE_BY_ISA(softmax_dots)
VMOE_BY_ISA(softmax_gather_backward)
VMOE_BY_ISA(softmax_scatter)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

template <typename T>
void softmax_gather(
    const T* logits,         // [G, T, E]
    const int32_t* indices,  // [G, T, K], or by expert [G, E, K]
    T* values,               // shape of indices
    T* high,                 // [G, T]
    T* scale,                // [G, T]
    int64_t G,
    int64_t tokens,
    int64_t E,
    int64_t K,
    bool by_expert,
    CUstream_st* stream);

// Bytes of workspace that softmax_gather_backward needs.
size_t softmax_gather_backward_workspace(
    int64_t G, int64_t tokens, int64_t E, int64_t K, bool by_expert);

// All steps of the backward.
template <typename T>
void softmax_gather_backward(
    const T* grad,           // shape of indices
    const T* values,         // shape of indices
    const T* logits,         // [G, T, E]
    const int32_t* indices,  // [G, T, K], or by expert [G, E, K]
    const T* high,           // [G, T]
    const T* scale,          // [G, T]
    T* grad_logits,          // [G, T, E]
    int64_t G,
    int64_t tokens,
    int64_t E,
    int64_t K,
    bool by_expert,
    void* workspace,  // softmax_gather_backward_workspace bytes
    CUstream_st* stream);

}  // namespace vmoe::cuda
