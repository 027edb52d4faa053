// grouped_mlp -- an MLP per expert, over the filled rows alone.
//
//   x       [E, N, D]   float32 | float64   N rows an expert: G segments of C = N / G rows
//   w1, b1  [E, D, F], [E, F]     same dtype; b1 may be missing
//   w2, b2  [E, F, D'], [E, D']   same dtype; b2 may be missing
//   filled  [E, G]      int32     rows at the front of every segment that are there; missing: all
//   y       [E, N, D']            gelu(x w1 + b1) w2 + b2; zeros where a row is not filled
//   hidden  [E, N, F]             x w1 without b1, kept for the gradient: the filled rows of an
//                                 expert one behind the other, nothing in what is left over
//
// Rows that are not filled are never read, and their gradient is zero.
//
//   gelu, tanh form:  x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))   (arXiv 1606.08415)
//   gelu, exact:      x Phi(x), the standard normal distribution
//
// Gradient, with h = gelu(a) and a = x w1 + b1:
//   grad_a = (grad_y w2^T) gelu'(a)    grad_w1 = x^T grad_a    grad_b1 = sum of grad_a
//   grad_x = grad_a w1^T               grad_w2 = h^T grad_y    grad_b2 = sum of grad_y
//
// The products are torch's (torch/grouped_mlp.cpp), a block of rows at a time; the kernels here
// do all that is between two products while the block is in cache.
#pragma once

#include <cstdint>

#include "isa.h"

namespace vmoe::cpu {

VMOE_EACH_ISA(

    // The absolute error is below 1e-6 (float) and 1e-14 (double) times max(1, |x|); of the
    // derivative too.
    template <typename T> void bias_gelu(
        const T* x,     // [rows, columns]
        const T* bias,  // [columns] or null
        T* out,         // [rows, columns]; may be x, if that is packed too
        int64_t rows,
        int64_t columns,
        int64_t x_stride,  // from row to row; out is packed
        bool tanh);

    template <typename T>
    void bias_gelu_backward(
        const T* x,     // [rows, columns]
        const T* bias,  // [columns] or null
        T* out,         // [rows, columns], gelu(x + bias); may be x as above
        T* grad,        // [rows, columns], of gelu(x + bias); becomes that of x
        T* grad_bias,   // [columns] or null; the sum over the rows is added
        int64_t rows,
        int64_t columns,
        int64_t x_stride,  // from row to row; out and grad are packed
        bool tanh);

    template <typename T>
    void add_bias(
        const T* x,     // [rows, columns]
        const T* bias,  // [columns] or null
        T* out,         // [rows, columns]; may be x
        int64_t rows,
        int64_t columns);

    template <typename T>
    void add_rows(
        const T* x,  // [rows, columns]
        T* sum,      // [columns]; the sum over the rows is added
        int64_t rows,
        int64_t columns);

)

VMOE_BY_ISA(bias_gelu)
VMOE_BY_ISA(bias_gelu_backward)
VMOE_BY_ISA(add_bias)
VMOE_BY_ISA(add_rows)

}  // namespace vmoe::cpu
