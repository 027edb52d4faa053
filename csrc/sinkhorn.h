// sinkhorn -- the entropy-regularised transport plan between tokens and experts.
//
//   logits   [G, T, E]  float32 | float64
//   plan     [G, T, E]  same dtype
//   history  [G, I, E]  float64   h after each of I iterations; zeros for iterations not done
//   error    [G]        float64   max_e |sum_t plan[t, e] - n/E| / (n/E)
//   steps    [G]        int32     number of iterations done
//
// Minimises <plan, -logits> + epsilon sum plan (log plan - 1) with row sums 1 and column sums n/E,
// where n is the number of present tokens. With M = logits / epsilon and f = 0 at first, an
// iteration updates the columns and then the rows:
//
//   h_e = log(n/E) - logsumexp_t(M[t, e] + f_t)
//   f_t =          - logsumexp_e(M[t, e] + h_e)       plan = exp(M + f + h)
//
// (Cuturi, arXiv 1306.0895; S-BASE, arXiv 2202.01169.) The row update is last, so rows sum to 1 up
// to one rounding error for logits of any size. After convergence, column sums have an error of
// about 2^-52 max |M|.
//
// A token whose logits are all -inf is masked: its plan is 0. If a group contains NaN or +inf, its
// whole plan and its whole gradient are NaN.
//
// With tolerance > 0 a group stops when error <= tolerance. On the CPU a group also stops when an
// iteration changes h by no more than the rounding error. After this second kind of stop, the
// remaining iterations count as done.
//
// Arithmetic: potentials are float64. The iteration runs on exp(M) if no present token of the group
// has a logit of -inf, and (max - min) / epsilon of its logits is at most
//   40   in float32, for float32 logits and a tolerance of 0 or at least 1e-4
//   200  in float64, for float64 logits and, on the CPU, for float32 logits
// All other groups iterate on logarithms in float64, with one exp per entry and update. `error` is
// exact to about 1e-7 if computed in float32.
//
// There are two gradients. sinkhorn_backward, the unrolled gradient, differentiates the iterations
// that were done. sinkhorn_backward reads the logits and `history`, and computes each f from h. On
// the CPU it skips the early iterations whose terms are smaller than the rounding error.
// sinkhorn_implicit_backward is the gradient of the fixed point, by the implicit function theorem
// at the plan that was reached. Values of `steps` outside [0, I] are clamped.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "common/parallel.h"

struct CUstream_st;

namespace vmoe::cpu {

VMOE_EACH_ISA(

    template <typename T> void sinkhorn(
        const T* logits,  // [G, T, E]
        T* plan,          // [G, T, E]
        double* history,  // [G, I, E]
        double* error,    // [G]
        int32_t* steps,   // [G]
        int64_t tokens,
        int64_t E,
        int64_t iterations,
        double epsilon,
        double tolerance,
        int64_t group_begin,
        int64_t group_end,
        const Parallel& parallel);

    template <typename T>
    void sinkhorn_backward(
        const T* grad,          // [G, T, E]  gradient of the plan
        const T* logits,        // [G, T, E]
        const double* history,  // [G, I, E]
        const int32_t* steps,   // [G]
        T* grad_logits,         // [G, T, E]
        int64_t tokens,
        int64_t E,
        int64_t iterations,
        double epsilon,
        int64_t group_begin,
        int64_t group_end,
        const Parallel& parallel);

    template <typename T>
    void sinkhorn_implicit_backward(
        const T* grad,   // [G, T, E]  gradient of the plan
        const T* plan,   // [G, T, E]
        T* grad_logits,  // [G, T, E]
        int64_t tokens,
        int64_t E,
        double epsilon,
        int64_t group_begin,
        int64_t group_end,
        const Parallel& parallel);

)

VMOE_BY_ISA(sinkhorn)
VMOE_BY_ISA(sinkhorn_backward)
VMOE_BY_ISA(sinkhorn_implicit_backward)

}  // namespace vmoe::cpu

namespace vmoe::cuda {

// Bytes of workspace that sinkhorn needs.
template <typename T>
size_t sinkhorn_workspace(int64_t G, int64_t tokens, int64_t E);

template <typename T>
void sinkhorn(
    const T* logits,  // [G, T, E]
    T* plan,          // [G, T, E]
    double* history,  // [G, I, E]
    double* error,    // [G]
    int32_t* steps,   // [G]
    int64_t G,
    int64_t tokens,
    int64_t E,
    int64_t iterations,
    double epsilon,
    double tolerance,
    void* workspace,  // sinkhorn_workspace bytes
    CUstream_st* stream);

template <typename T>
size_t sinkhorn_backward_workspace(int64_t G, int64_t tokens, int64_t E);

template <typename T>
void sinkhorn_backward(
    const T* grad,          // [G, T, E]  gradient of the plan
    const T* logits,        // [G, T, E]
    const double* history,  // [G, I, E]
    const int32_t* steps,   // [G]
    T* grad_logits,         // [G, T, E]
    int64_t G,
    int64_t tokens,
    int64_t E,
    int64_t iterations,
    double epsilon,
    void* workspace,  // sinkhorn_backward_workspace bytes
    CUstream_st* stream);

template <typename T>
size_t sinkhorn_implicit_backward_workspace(int64_t G, int64_t tokens, int64_t E);

template <typename T>
void sinkhorn_implicit_backward(
    const T* grad,   // [G, T, E]  gradient of the plan
    const T* plan,   // [G, T, E]
    T* grad_logits,  // [G, T, E]
    int64_t G,
    int64_t tokens,
    int64_t E,
    double epsilon,
    void* workspace,  // sinkhorn_implicit_backward_workspace bytes
    CUstream_st* stream);

}  // namespace vmoe::cuda
