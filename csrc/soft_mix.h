// soft_mix -- the two softmaxes of Soft MoE, and the weighted means of tokens or slots.
//
//   logits   [G, T, S]  float32 | float64
//   weights  [G, T, S]  the values' dtype   softmax of the logits over the tokens (the dispatch
//                                           tensor) or over the slots (the combine tensor)
//   values              the logits' dtype; on CUDA also bfloat16 | float16, with float32 logits
//
// The means over the tokens are softmax_t(logits)^T values, [E, G, C, D] with S = E * C. The means
// over the slots are softmax_s(logits) values, [G, T, D] (Puigcerver et al., arXiv 2308.00951,
// equations 1 and 2). A logit of -inf is masked. If all logits of a softmax are -inf, its weights
// are 0, not NaN. So a masked token neither contributes to slots nor receives from slots.
//
// On a CPU each group has its own product (cpu/product.h), so that no tensor holds the weights of
// all groups. On CUDA one product covers all groups. It is computed in the same kernel as the
// softmax (soft_mix_product), or by torch.
//
// Gradient of the softmax: grad_logits = weights (grad - sum over the axis of weights * grad).
//
// 16-bit values are multiplied in 16 bits, with sums in float32. The softmaxes are computed in
// float32. Each weight is rounded to the dtype of the values, as with the softmax and bmm of torch.
// The error of a result is at most epsilon * sum |weight * value|. If torch computes the product,
// small float16 weights are subnormal numbers, with an absolute error of up to 3e-8. The gradient
// of the logits is computed from unrounded weights and a float32 gradient of the weights.
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
// to 16 bytes (common/row_stride.h). Columns from S on are padding.
template <typename Row>
void soft_mix(
    const Compute<Row>* logits,  // [G, T, S]
    Row* weights,                // [G, T, row_stride]
    int64_t G,
    int64_t tokens,
    int64_t S,
    bool over_tokens,
    CUstream_st* stream);

// Recomputes the weights, and computes the gradient of the logits.
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

// out = the mean of 16-bit values, weighted by the softmax of the logits, in one kernel. The kernel
// takes rows that are aligned to 16 bytes and a multiple of 16 bytes long, means over 1 to 256
// values, and only shapes that fit in shared memory. For all other arguments it returns false,
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
