// grouped_mlp -- an MLP per expert, over the filled rows alone.
//
//   x       [E, N, D]   float32 | float64 (CUDA: | bfloat16 | float16)
//                                 N rows an expert: G segments of C = N / G rows
//   w1, b1  [E, D, F], [E, F]     same dtype; b1 may be missing
//   w2, b2  [E, F, D'], [E, D']   same dtype; b2 may be missing
//   filled  [E, G]      int32     rows at the front of every segment that are there; missing: all
//   y       [E, N, D']            gelu(x w1 + b1) w2 + b2; zeros where a row is not filled
//   hidden  [E, N, F]             x w1 without b1, kept for the gradient. CPU: the filled rows of an
//                                 expert one behind the other, nothing in what is left over; CUDA:
//                                 where x has them
//
// Rows that are not filled come out as zeros and their gradient is zero. On a CPU they are never
// read; on CUDA they go through the products, and what is in x there must be finite.
//
// Gradient, with h = gelu(a) and a = x w1 + b1 (gelu.h):
//   grad_a = (grad_y w2^T) gelu'(a)    grad_w1 = x^T grad_a    grad_b1 = sum of grad_a
//   grad_x = grad_a w1^T               grad_w2 = h^T grad_y    grad_b2 = sum of grad_y
//
// The products are cpu/product.cpp on a CPU and torch's on CUDA (torch/{cpu,cuda}/grouped_mlp.h
// call them). The kernels here do what is between two products: on a CPU while a block of rows is
// in cache, on CUDA in one pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/half.h"
#include "common/isa.h"

struct CUstream_st;

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

namespace vmoe::cuda {

// Rows of E experts, N each: G segments, of which the first filled[e, g] are filled; null: all are.
struct ExpertRows {
  const int32_t* filled;  // [E, G] or null
  int64_t E, N, G;
};

// 16-bit rows are computed in float, and sums kept in it. The error of GELU is the CPU's.
template <typename Row>
void bias_gelu(
    const Row* x,     // [E, N, columns]
    const Row* bias,  // [E, columns] or null
    Row* out,         // [E, N, columns], zeros where a row is not filled; may be x
    const ExpertRows& rows,
    int64_t columns,
    bool tanh,
    CUstream_st* stream);

// Bytes that a sum over rows needs for its parts: the same order every time, no atomics.
template <typename Row>
size_t sum_workspace(const ExpertRows& rows, int64_t columns);

template <typename Row>
void bias_gelu_backward(
    const Row* x,     // [E, N, columns]
    const Row* bias,  // [E, columns] or null
    Row* out,         // [E, N, columns] or null, as above; may be x
    Row* grad,        // [E, N, columns], of gelu(x + bias); becomes that of x, zeros as above
    Row* grad_bias,   // [E, columns] or null
    void* workspace,  // sum_workspace; null without grad_bias
    const ExpertRows& rows,
    int64_t columns,
    bool tanh,
    CUstream_st* stream);

template <typename Row>
void add_bias(
    Row* y,           // [E, N, columns]; becomes zeros where a row is not filled
    const Row* bias,  // [E, columns] or null
    const ExpertRows& rows,
    int64_t columns,
    CUstream_st* stream);

template <typename Row>
void sum_rows(
    const Row* x,     // [E, N, columns]
    Row* out,         // [E, N, columns] or null; x, zeros where a row is not filled
    Row* sum,         // [E, columns], over the filled rows
    void* workspace,  // sum_workspace
    const ExpertRows& rows,
    int64_t columns,
    CUstream_st* stream);

}  // namespace vmoe::cuda
