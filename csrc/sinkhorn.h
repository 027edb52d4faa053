// sinkhorn -- entropy-regularised transport plan between tokens and experts.
//
//   logits   [G, T, E]  float32 | float64
//   plan     [G, T, E]  same dtype
//   history  [G, I, E]  float64   h after every iteration; zeros after the last iteration done
//   error    [G]        float64   max_e |sum_t plan[t, e] - n/E| / (n/E)
//   steps    [G]        int32     iterations done
//
// Minimises <plan, -logits> + epsilon sum plan (log plan - 1) with row sums 1 and
// column sums n/E, in the log domain, M = logits / epsilon, f = 0 at first:
//
//   h_e = log(n/E) - logsumexp_t(M[t, e] + f_t)
//   f_t =          - logsumexp_e(M[t, e] + h_e)       plan = exp(M + f + h)
//
// (Cuturi, arXiv 1306.0895; S-BASE, arXiv 2202.01169.) The row update is last, so rows sum to 1, to
// a rounding, however large the logits are. Column sums are exact to about 2^-52 max |M|. With
// tolerance > 0 a group stops once error <= tolerance. On the CPU an iteration that leaves h
// unchanged, but for a rounding, is the last to be run; the remaining ones, which would leave it
// unchanged too, count as done. A row that is all -inf is an absent token: n counts the present
// tokens, its plan is 0. A group with NaN or +inf among its logits gets NaN, its gradient too.
// Potentials are float64. If the logits of a group are within 40 of each other (over epsilon) the
// iteration runs on exp(M) in float32 for float32 logits, within 200 in float64, else on
// logarithms, with one exp per entry and step. The float32 error is exact to about 1e-7; a
// tolerance below 1e-4 takes float64. On CUDA there is no exp(M) in float64 for float32 logits:
// beyond 40 they take the logarithms.
//
// Two gradients: of the iterations done (unrolled; f_i is recomputed from h_i, so
// that one [T, E] tensor and I * E numbers are all that is kept), and of the fixed
// point by the implicit function theorem at the plan reached. On the CPU the former leaves out the
// early iterations that can add nothing beyond rounding. Steps beyond [0, I] are clamped.
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
        const T* grad,          // [G, T, E] of the plan
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
        const T* grad,   // [G, T, E] of the plan
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
    const T* grad,          // [G, T, E] of the plan
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
    const T* grad,   // [G, T, E] of the plan
    const T* plan,   // [G, T, E]
    T* grad_logits,  // [G, T, E]
    int64_t G,
    int64_t tokens,
    int64_t E,
    double epsilon,
    void* workspace,  // sinkhorn_implicit_backward_workspace bytes
    CUstream_st* stream);

}  // namespace vmoe::cuda
