// soft_mix -- the two softmaxes of Soft MoE.
//
//   logits   [G, T, S]  float32 | float64
//   weights  [G, T, S]  the values' dtype   softmax of the logits over the tokens (the dispatch
//                                           tensor) or over the slots (the combine tensor)
//   values              the logits' dtype; on CUDA also bfloat16 | float16, the logits being float32
//
// out = softmax_t(logits)^T values  [E, G, C, D], S = E * C, or softmax_s(logits) values
// [G, T, D] (Puigcerver et al., arXiv 2308.00951, equations 1 and 2). On a CPU the products are of
// a group at a time (cpu/product.h), so that no tensor ever holds the weights of all groups; on CUDA
// they are one kernel with the softmax, or torch's, of all groups at once.
// -inf is "not there"; a line of -inf alone gets zeros, not NaN: a padding token
// neither gives nor takes.
//
// Gradient of the softmax: grad_logits = weights (grad - sum over the axis of weights * grad).
//
// Values in 16 bits are multiplied in 16 bits, with sums in float32: the softmaxes are computed in
// float32, and each weight is rounded to the values' dtype, as torch's own softmax and bmm would
// have it; a result is off by at most an epsilon of sum |weight * value|. The gradient of the
// weights is a product that leaves its float32 sums as they are, and meets weights that were not
// rounded: that of the logits is float32's. (Weights in float16 that torch multiplies are held to
// 3e-8: of 10^4 equal ones to its own epsilon.)
//
// Who multiplies on CUDA: for 256 images of 196 tokens and 196 slots, D = 768, in bfloat16, a mean
// reads 77 MB, writes 77 MB, and reads 39 MB of logits: dispatch and combine 386 MB, which a card
// with 4.3 TB/s moves in 90 us, and 30 GFLOP. As softmaxes of ours and products of torch's they are
// 466 MB, for the weights are written and read as well, 108 us, and 72 us more for copies of the
// slots where experts have several; torch's own softmax and bmm under autocast move another 158 MB.
// So up to 256 values a line soft_mix_product does it, which pays from 280 TFLOP/s on, and where
// memory is slower against arithmetic from less on. The arithmetic of longer lines outgrows what
// that saves: they are torch's. So is backward, where a line's gradient needs all of its products
// before the first of them can be used. (Arithmetic; no GPU has measured it.)
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

// Weights are of the dtype of what they mix, and their rows row_stride<Row>(S) long (row_stride.h),
// from 16 bytes on; what is behind S belongs to nobody.
template <typename Row>
void soft_mix(
    const Compute<Row>* logits,  // [G, T, S]
    Row* weights,                // [G, T, row_stride]
    int64_t G,
    int64_t tokens,
    int64_t S,
    bool over_tokens,
    CUstream_st* stream);

// Makes the weights once more.
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

// out = the softmax's mean of the values, in one kernel; false, and nothing done, where it does not
// take the shapes: it takes rows of whole 16 bytes, and lines of up to 256 values. Rows in 16 bits.
template <typename Row>
bool soft_mix_product(
    const float* logits,  // [G, T, S], S = E * C
    const Row* values,    // over tokens [G, T, D], else [E, G, C, D]
    Row* out,             // the other one
    int64_t G,
    int64_t tokens,
    int64_t E,
    int64_t C,
    int64_t D,
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
