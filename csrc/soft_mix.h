// soft_mix -- the two softmaxes of Soft MoE, and the weighted means of tokens or slots.
//
//   logits   [G, T, S]  float32 | float64
//   weights  [G, T, S]  the values' dtype   softmax of the logits over the tokens (the dispatch
//                                           tensor) or over the slots (the combine tensor)
//   values              the logits' dtype; on CUDA also bfloat16 | float16, with float32 logits
//
// out = softmax_t(logits)^T values  [E, G, C, D], S = E * C, or softmax_s(logits) values [G, T, D]
// (Puigcerver et al., arXiv 2308.00951, equations 1 and 2). A logit of -inf is masked. A softmax
// over -inf alone gives zeros, not NaN: a masked token neither contributes to slots nor receives
// from them.
//
// On a CPU products take one group at a time (cpu/product.h), so that no tensor holds the weights
// of all groups. On CUDA a product takes all groups, in one kernel with the softmax
// (soft_mix_product) or by torch.
//
// Gradient of the softmax: grad_logits = weights (grad - sum over the axis of weights * grad).
//
// 16-bit values are multiplied in 16 bits, with sums in float32. The softmaxes are computed in
// float32, and each weight is rounded to the dtype of the values, as in torch's own softmax and
// bmm. The error of a result is at most epsilon * sum |weight * value|. (float16 weights that torch
// multiplies also have an absolute error of up to 3e-8.) The gradient of the logits is computed
// from unrounded weights and a float32 gradient of the weights.
#pragma once

#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

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
        T* grad,           // [G, T, S]  in: gradient of the weights; out: gradient of the logits
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

// Weights have the dtype of the values. Their rows are row_stride<Row>(S) entries apart and aligned
// to 16 bytes (common/row_stride.h); columns from S on are padding.
template <typename Row>
void soft_mix(
    const Compute<Row>* logits,  // [G, T, S]
    Row* weights,                // [G, T, row_stride]
    int64_t G,
    int64_t tokens,
    int64_t S,
    bool over_tokens,
    CUstream_st* stream);

// Computes the weights again, and the gradient.
template <typename Row>
void soft_mix_backward(
    const Compute<Row>* logits,  // [G, T, S]
    Row* weights,                // [G, T, row_stride]
    Compute<Row>* grad,  // [G, T, S]  in: gradient of the weights; out: gradient of the logits
    int64_t G,
    int64_t tokens,
    int64_t S,
    bool over_tokens,
    CUstream_st* stream);

// out = the mean of 16-bit values, weighted by the softmax of the logits, in one kernel. It serves
// rows whose size is a multiple of 16 bytes, and means over 1 to 256 values. Else it returns false,
// without a launch.
template <typename Row>
bool soft_mix_product(
    const float* logits,  // [G, T, S], S = E * C
    const Row* values,    // over tokens [G, T, D], else [E, G, C, D]
    Row* out,             // over tokens [E, G, C, D], else [G, T, D]
    int64_t G,
    int64_t tokens,
    int64_t E,
    int64_t C,
    int64_t D,
    bool over_tokens,
    CUstream_st* stream);

// Copies slots [E, G, C, D] to the rows [G, E * C, D] that the products take, or back.
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
