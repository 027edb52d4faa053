// ksparse_projection -- projection onto the simplex with at most k non-zeros.
//
//   x    [N, n]  float32 | float64
//   out  [N, n]  same dtype
//
// argmin |p - x|^2 over p >= 0, sum p = 1, |p|_0 <= k (Liu et al., arXiv 2209.15466,
// section 3; Kyrillidis et al., arXiv 1206.1529): of the k largest u_1 >= ... >= u_k,
//   rho = max{r : 1 + r u_r > u_1 + ... + u_r},  tau = (u_1 + ... + u_rho - 1) / rho,
//   p_i = max(u_i - tau, 0) on those, 0 elsewhere.
// Ties: order.h. -inf never gets mass. A row with NaN or +inf, or of -inf alone, gets NaN.
#pragma once

#include <cstdint>

#include "isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename T> void ksparse_projection(
        const T* x,  // [N, n]
        T* out,      // [N, n]
        int64_t n,
        int64_t k,
        int64_t row_begin,
        int64_t row_end);

)

VMOE_BY_ISA(ksparse_projection)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

template <typename T>
void ksparse_projection(
    const T* x,  // [N, n]
    T* out,      // [N, n]
    int64_t n,
    int64_t k,
    int64_t rows,  // N
    CUstream_st* stream);

}  // namespace vmoe::cuda
