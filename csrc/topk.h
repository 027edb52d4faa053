// topk -- the k largest entries along one axis, in the order of order.h.
//
//   x        [N, n, M]  float32 | float64   N indices before the axis, M after
//   values   [N, M, k]  same dtype           largest first; the axis of the picks is last
//   indices  [N, M, k]  int32                distinct positions on the axis, in [0, n)
//
// 0 <= k <= n. NaN counts as the largest value, so indices are unique and in range for any input.
// The result is deterministic. There are N * M rows, one per pair of indices before and after the
// axis.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename T> void topk(
        const T* x,        // [N, n, M]
        T* values,         // [N, M, k]
        int32_t* indices,  // [N, M, k]
        int64_t n,
        int64_t M,
        int64_t k,
        int64_t row_begin,  // rows [row_begin, row_end) of N * M
        int64_t row_end);

)

VMOE_BY_ISA(topk)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// Bytes of workspace that topk needs.
template <typename T>
size_t topk_workspace(int64_t n, int64_t M, int64_t k, int64_t rows);

template <typename T>
void topk(
    const T* x,        // [N, n, M]
    T* values,         // [N, M, k]
    int32_t* indices,  // [N, M, k]
    int64_t n,
    int64_t M,
    int64_t k,
    int64_t rows,     // N * M
    void* workspace,  // topk_workspace bytes
    CUstream_st* stream);

}  // namespace vmoe::cuda
