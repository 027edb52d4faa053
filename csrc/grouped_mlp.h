// grouped_mlp -- the MLPs of all experts, over the filled rows.
//
//   x       [E, N, D]   float32 | float64 (CUDA: | bfloat16 | float16)
//                                 N rows per expert: G segments of C = N / G rows
//   w1, b1  [E, D, F], [E, F]     same dtype; b1 is optional
//   w2, b2  [E, F, D'], [E, D']   same dtype; b2 is optional
//   filled  [E, G]      int32     number of filled rows, the first of each segment; null: all
//   y       [E, N, D']            gelu(x w1 + b1) w2 + b2; zeros if a row is not filled
//   hidden  [E, N, F]             x w1 without b1, kept for the gradient. On a CPU the filled rows
//                                 of an expert are contiguous, and the remaining rows undefined. On
//                                 CUDA rows are in the order of x
//
// Rows that are not filled give zeros, and their gradient is zero. On a CPU they are never read. On
// CUDA they take part in the products, so their entries of x must be finite.
//
// Gradient, with h = gelu(a) and a = x w1 + b1 (gelu.h):
//   grad_a = (grad_y w2^T) gelu'(a)    grad_w1 = x^T grad_a    grad_b1 = sum of grad_a
//   grad_x = grad_a w1^T               grad_w2 = h^T grad_y    grad_b2 = sum of grad_y
//
// torch/{cpu,cuda}/grouped_mlp.h compute the op. The matrix products are computed by
// cpu/product.cpp on a CPU, and by torch on CUDA. The kernels below are the element-wise steps
// between the products.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    // The absolute errors of gelu and of its derivative are below 1e-6 (float) and 1e-14 (double)
    // times max(1, |x|).
    template <typename T> void bias_gelu(
        const T* x,     // [rows, columns]
        const T* bias,  // [columns] or null
        T* out,         // [rows, columns]; may be x if x is contiguous
        int64_t rows,
        int64_t columns,
        int64_t x_stride,  // entries from row to row of x; out is contiguous
        bool tanh);

    template <typename T>
    void bias_gelu_backward(
        const T* x,     // [rows, columns]
        const T* bias,  // [columns] or null
        T* out,         // [rows, columns], gelu(x + bias); may be x if x is contiguous
        T* grad,        // [rows, columns]  in: gradient of gelu(x + bias); out: gradient of x
        T* grad_bias,   // [columns] or null  += sum over the rows
        int64_t rows,
        int64_t columns,
        int64_t x_stride,  // entries from row to row of x; out and grad are contiguous
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
        T* sum,      // [columns]  += sum over the rows
        int64_t rows,
        int64_t columns);

)

VMOE_BY_ISA(bias_gelu)
VMOE_BY_ISA(bias_gelu_backward)
VMOE_BY_ISA(add_bias)
VMOE_BY_ISA(add_rows)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// Rows of E experts, N per expert, in G segments. The first filled[e, g] rows of a segment are
// filled; null: all rows.
struct ExpertRows {
  const int32_t* filled;  // [E, G] or null
  int64_t E, N, G;
};

// 16-bit rows are computed and summed in float. The error of GELU in float is 3 ulp larger than on
// the CPU.
template <typename Row>
void bias_gelu(
    const Row* x,     // [E, N, columns]
    const Row* bias,  // [E, columns] or null
    Row* out,         // [E, N, columns], zeros if a row is not filled; may be x
    const ExpertRows& rows,
    int64_t columns,
    bool tanh,
    CUstream_st* stream);

// Bytes of workspace for a sum over rows. The sum has a fixed order, so it is deterministic.
template <typename Row>
size_t sum_workspace(const ExpertRows& rows, int64_t columns);

template <typename Row>
void bias_gelu_backward(
    const Row* x,     // [E, N, columns]
    const Row* bias,  // [E, columns] or null
    Row* out,         // [E, N, columns] or null, as in bias_gelu; may be x
    Row* grad,        // [E, N, columns]  in: gradient of gelu(x + bias); out: gradient of x, zeros
                      //   if a row is not filled
    Row* grad_bias,   // [E, columns] or null
    void* workspace,  // sum_workspace bytes; null without grad_bias
    const ExpertRows& rows,
    int64_t columns,
    bool tanh,
    CUstream_st* stream);

template <typename Row>
void add_bias(
    Row* y,           // [E, N, columns]  set to zeros if a row is not filled
    const Row* bias,  // [E, columns] or null
    const ExpertRows& rows,
    int64_t columns,
    CUstream_st* stream);

template <typename Row>
void sum_rows(
    const Row* x,     // [E, N, columns]
    Row* out,         // [E, N, columns] or null; x, or zeros if a row is not filled
    Row* sum,         // [E, columns], over the filled rows
    void* workspace,  // sum_workspace bytes
    const ExpertRows& rows,
    int64_t columns,
    CUstream_st* stream);

}  // namespace vmoe::cuda
