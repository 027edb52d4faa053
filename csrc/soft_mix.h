// soft_mix -- the two softmaxes of Soft MoE.
//
//   logits   [G, T, S]  float32 | float64
//   weights  [G, T, S]  same dtype   softmax of the logits over the tokens (the dispatch
//                                    tensor) or over the slots (the combine tensor)
//
// out = softmax_t(logits)^T values  [E, G, C, D], S = E * C, or softmax_s(logits) values
// [G, T, D] (Puigcerver et al., arXiv 2308.00951, equations 1 and 2). On a CPU the products are of
// a group at a time (product.h), so that no tensor ever holds the weights of all groups; on CUDA
// they are torch's and, since one call has to fill the device, of all groups.
// -inf is "not there"; a line of -inf alone gets zeros, not NaN: a padding token
// neither gives nor takes.
//
// Gradient of the softmax: grad_logits = weights (grad - sum over the axis of weights * grad).
#pragma once

#include <cstdint>

#include "isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename T> void soft_mix(
        const T* logits,  // [G, T, S]
        T* weights,       // [G, T, S]
        int64_t tokens,
        int64_t S,
        bool over_tokens,
        int64_t group_begin,
        int64_t group_end);

    template <typename T>
    void soft_mix_backward(
        const T* weights,  // [G, T, S]
        T* grad,           // [G, T, S]  in: of the weights; out: of the logits
        int64_t tokens,
        int64_t S,
        bool over_tokens,
        int64_t group_begin,
        int64_t group_end);

)

VMOE_BY_ISA(soft_mix)
VMOE_BY_ISA(soft_mix_backward)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

template <typename T>
void soft_mix(
    const T* logits,  // [G, T, S]
    T* weights,       // [G, T, S]
    int64_t G,
    int64_t tokens,
    int64_t S,
    bool over_tokens,
    CUstream_st* stream);

template <typename T>
void soft_mix_backward(
    const T* weights,  // [G, T, S]
    T* grad,           // [G, T, S]  in: of the weights; out: of the logits
    int64_t G,
    int64_t tokens,
    int64_t S,
    bool over_tokens,
    CUstream_st* stream);

// Slots [E, G, C, D] to the rows [G, E * C, D] that the products take, or back.
template <typename T>
void soft_mix_rows(
    const T* slots,  // [E, G, C, D]
    T* rows,         // [G, E * C, D]
    int64_t G,
    int64_t E,
    int64_t C,
    int64_t D,
    CUstream_st* stream);

template <typename T>
void soft_mix_slots(
    const T* rows,  // [G, E * C, D]
    T* slots,       // [E, G, C, D]
    int64_t G,
    int64_t E,
    int64_t C,
    int64_t D,
    CUstream_st* stream);

}  // namespace vmoe::cuda
