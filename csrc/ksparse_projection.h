// ksparse_projection -- projection onto the simplex with at most k non-zeros.
//
//   x    [N, n]  float32 | float64
//   out  [N, n]  same dtype
//
// argmin |p - x|^2 over p >= 0, sum p = 1, |p|_0 <= k (Liu et al., arXiv 2209.15466,
// section 3; Kyrillidis et al., arXiv 1206.1529). With the k largest entries u_1 >= ... >= u_k,
//   rho = max{r : 1 + r u_r > u_1 + ... + u_r},  tau = (u_1 + ... + u_rho - 1) / rho,
//   p_i = max(u_i - tau, 0) for these k entries, 0 for all other entries.
// Ties are resolved as in order.h. An entry of -inf is 0 in p. A row that contains NaN or +inf, or
// only -inf, gives NaN.
//
// Backward of projections along the middle axis:
//   grad, out  [A, n, B]  gradient of the projections, and the projections
//   grad_x     [A, n, B]  grad minus its mean over the support where out != 0; 0 elsewhere
#pragma once

#include <cstdint>

#include "common/isa.h"

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

    template <typename T>
    void ksparse_projection_backward(
        const T* grad,  // [A, n, B]
        const T* out,   // [A, n, B]
        T* grad_x,      // [A, n, B]
        int64_t n,
        int64_t B,
        int64_t begin,  // [begin, end) of the first axis
        int64_t end);

)

VMOE_BY_ISA(ksparse_projection)
VMOE_BY_ISA(ksparse_projection_backward)

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

template <typename T>
void ksparse_projection_backward(
    const T* grad,  // [A, n, B]
    const T* out,   // [A, n, B]
    T* grad_x,      // [A, n, B]
    int64_t A,
    int64_t n,
    int64_t B,
    CUstream_st* stream);

}  // namespace vmoe::cuda
