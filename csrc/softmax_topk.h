// softmax_topk -- softmax over the experts, and the k largest gates along one axis.
//
//   logits   [G, T, E]                       float32 | float64
//   values   [G, T, K] or [G, E, C]          same dtype   the chosen gates, largest first
//   indices  like values                     int32        experts of every token (dim 2), or tokens
//                                                         of every expert (dim 1)
//   norms    [2, G, T]                       same dtype   as in softmax_gather.h
//
// The result equals, to the bit, topk of the gates that softmax_gather computes in the logits'
// dtype. Gates that round to the same number tie, for example two gates that underflow to 0. Ties
// go to the lower index. NaN gates rank first.
//
// A token whose logits are all -inf is masked: its picks have index -1 and value 0, and no expert
// chooses it. An expert with fewer present tokens than picks gets index -1 and value 0 for the
// remaining picks.
//
// Gradient: the gradient of softmax_gather at the indices.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename T> void softmax_topk(
        const T* logits,   // [tokens, E]
        T* values,         // [tokens, k]
        int32_t* indices,  // [tokens, k]
        T* high,           // [tokens]  norms[0]
        T* scale,          // [tokens]  norms[1]
        int64_t E,
        int64_t k,
        int64_t begin,  // tokens [begin, end)
        int64_t end);

    // Writes all gates, among which softmax_choose picks tokens. The gates of a masked token are
    // -inf.
    template <typename T>
    void softmax_gates(
        const T* logits,  // [G, T, E]
        T* gates,         // [G, T, E], or by expert [G, E, T]
        T* high,          // [G, T]
        T* scale,         // [G, T]
        int64_t tokens,
        int64_t E,
        bool by_expert,
        int64_t begin,  // tokens [begin, end) of G * T
        int64_t end);

    // The k largest gates of every expert.
    template <typename T>
    void softmax_choose(
        const T* gates,    // the result of softmax_gates
        T* values,         // [G, E, k]
        int32_t* indices,  // [G, E, k]
        int64_t tokens,
        int64_t E,
        int64_t k,
        bool by_expert,
        int64_t begin,  // experts [begin, end) of G * E
        int64_t end);

)

VMOE_BY_ISA(softmax_topk)
VMOE_BY_ISA(softmax_gates)
VMOE_BY_ISA(softmax_choose)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// Bytes of workspace that softmax_topk needs.
template <typename T>
size_t softmax_topk_workspace(int64_t G, int64_t tokens, int64_t E, int64_t k, bool of_tokens);

template <typename T>
void softmax_topk(
    const T* logits,   // [G, T, E]
    T* values,         // [G, T, k], or with of_tokens [G, E, k]
    int32_t* indices,  // like values
    T* high,           // [G, T]  norms[0]
    T* scale,          // [G, T]  norms[1]
    int64_t G,
    int64_t tokens,
    int64_t E,
    int64_t k,
    bool of_tokens,   // whether experts choose tokens, instead of tokens choosing experts
    void* workspace,  // softmax_topk_workspace bytes
    CUstream_st* stream);

}  // namespace vmoe::cuda
