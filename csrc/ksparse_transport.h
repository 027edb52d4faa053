// ksparse_transport -- a transport plan with at most k tokens per expert.
//
//   similarity  [G, T, E]  float32 | float64   S
//   plan        [G, T, E]  same dtype
//
// Maximises the semi-dual of the sparsity-constrained problem (Liu et al., arXiv 2209.15466,
// section 4) with row sums 1 and column sums b = n/E. The variable is alpha in R^n, which is 0 at
// first. n is the number of present tokens. P_k is the projection of ksparse_projection.h.
//
//   objective  <alpha, 1> - sum_e b max_{p in simplex, |p|_0 <= k}
//                                     (<alpha + S[:, e], p> - gamma b/2 |p|^2)
//   gradient   1 - sum_e b P_k((alpha + S[:, e]) / (gamma b))
//   plan       plan[:, e] = b P_k((alpha + S[:, e]) / (gamma b))
//
// After any number of iterations, column sums are n/E and a column has at most k non-zeros. The
// iterations bring row sums closer to 1. All numbers are computed in float64.
//
// Adam: lr = learning_rate, betas 0.9 and 0.999, eps 1e-8, bias-corrected. A group stops after the
// first update whose gradient has |gradient|_2 <= tolerance.
//
// L-BFGS: memory 10, backtracking line search. A group stops before an update whose gradient has
// |gradient|_2 <= tolerance. A group also stops if no step improves the objective, which may happen
// at a kink of the objective.
//
// A token whose similarities are all -inf is masked: its plan is 0. An expert whose similarities
// are all -inf gets a plan of 0. If a group contains NaN or +inf, its whole plan is NaN.
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

// Bytes of workspace that ksparse_transport needs.
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
    void* workspace,  // ksparse_transport_workspace bytes
    CUstream_st* stream);

}  // namespace cuda
}  // namespace vmoe
