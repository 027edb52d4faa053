// soft_mix -- the two softmaxes of Soft MoE, and the means that they weight.
//
//   logits   [G, T, S]  float32 | float64
//   weights  [G, T, S]  the values' dtype   softmax of the logits over the tokens (the dispatch
//                                           tensor) or over the slots (the combine tensor)
//   values              the logits' dtype; on CUDA also bfloat16 | float16, with float32 logits
//
// out = softmax_t(logits)^T values  [E, G, C, D], S = E * C, or softmax_s(logits) values [G, T, D]
// (Puigcerver et al., arXiv 2308.00951, equations 1 and 2). On a CPU products take one group at a
// time (cpu/product.h), so that no tensor ever holds the weights of all groups; on CUDA a product
// takes all groups, in one kernel with the softmax (soft_mix_product) or by torch. A logit of -inf
// is masked. A softmax over -inf alone gives zeros, not NaN: a padding token neither contributes
// to slots nor receives from them.
//
// Gradient of the softmax: grad_logits = weights (grad - sum over the axis of weights * grad).
//
// Values in 16 bits are multiplied in 16 bits, with sums in float32. The softmaxes are computed in
// float32, and each weight is rounded to the values' dtype, as torch's own softmax and bmm round
// it: a result is off by at most an epsilon of sum |weight * value|. The gradient of the weights
// stays in float32 and meets unrounded weights, so the gradient of the logits is as exact as in
// float32. (float16 weights that torch multiplies have an absolute error of up to 3e-8.)
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

// Computes the weights again.
template <typename Row>
void soft_mix_backward(
    const Compute<Row>* logits,  // [G, T, S]
    Row* weights,                // [G, T, row_stride]
    Compute<Row>* grad,          // [G, T, S]  in: of the weights; out: of the logits
    int64_t G,
    int64_t tokens,
    int64_t S,
    bool over_tokens,
    CUstream_st* stream);

// out = the softmax's mean of the values, in one kernel, for values in 16 bits. Returns false,
// without a launch, for shapes that it does not serve: it wants rows of whole 16 bytes and means
// over up to 256 values.
template <typename Row>
bool soft_mix_product(
    const float* logits,  // [G, T, S], S = E * C
    const Row* values,    // over tokens [G, T, D], else [E, G, C, D]
    Row* out,             // the other of these shapes
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
