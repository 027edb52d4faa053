// ksparse_transport -- transport plan with at most k tokens per expert.
//
//   similarity  [G, T, E]  float32 | float64   S
//   plan        [G, T, E]  same dtype
//
// Semi-dual of the sparsity-constrained problem (Liu et al., arXiv 2209.15466,
// section 4), with row sums 1, column sums b = n/E, P_k of ksparse_projection.h,
// maximised over alpha in R^n from 0:
//
//   <alpha, 1> - sum_e b max_{p in simplex, |p|_0 <= k} (<alpha + S[:, e], p> - gamma b/2 |p|^2)
//   gradient:  1 - sum_e b P_k((alpha + S[:, e]) / (gamma b))
//
// plan[:, e] = b P_k((alpha + S[:, e]) / (gamma b)): column sums are n/E and a column
// has at most k non-zeros, whatever the iterations; row sums are driven towards 1.
//
// Adam: lr = learning_rate, betas 0.9 / 0.999, eps 1e-8, bias-corrected. A group
// stops after the update whose gradient had |gradient|_2 <= tolerance.
// L-BFGS: memory 10, backtracking line search, stops at the same tolerance before
// the update; where no step improves it stops too (the objective has kinks).
// A row that is all -inf is an absent token: n counts the others, its plan is 0.
// A column that is all -inf stays 0. A group with NaN or +inf gets NaN. float64 inside.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/isa.h"
#include "common/parallel.h"

struct CUstream_st;

namespace vmoe {

enum class Solver { kAdam, kLbfgs };

struct TransportOptions {
  int64_t k;
  int64_t iterations;
  Solver solver;
  double learning_rate;
  double tolerance;
  double gamma;
};

namespace cpu {

VMOE_EACH_ISA(

    template <typename T> void ksparse_transport(
        const T* similarity,  // [G, T, E]
        T* plan,              // [G, T, E]
        int64_t tokens,
        int64_t E,
        const TransportOptions& options,
        int64_t group_begin,
        int64_t group_end,
        const Parallel& parallel);

)

VMOE_BY_ISA(ksparse_transport)

}  // namespace cpu

namespace cuda {

// Bytes of workspace that ksparse_transport asks for.
template <typename T>
size_t ksparse_transport_workspace(
    int64_t G, int64_t tokens, int64_t E, const TransportOptions& options);

template <typename T>
void ksparse_transport(
    const T* similarity,  // [G, T, E]
    T* plan,              // [G, T, E]
    int64_t G,
    int64_t tokens,
    int64_t E,
    const TransportOptions& options,
    void* workspace,  // of ksparse_transport_workspace
    CUstream_st* stream);

}  // namespace cuda
}  // namespace vmoe
