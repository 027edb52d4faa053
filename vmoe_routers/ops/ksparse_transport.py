"""ksparse_transport: a transport plan with at most k tokens per expert."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, fill_masked

check: Check = Check("ksparse_transport")

SOLVERS = ("adam", "lbfgs")


def ksparse_transport(
    similarity: Tensor,
    k: int,
    *,
    iterations: int = 20,
    solver: Literal["adam", "lbfgs"] = "adam",
    learning_rate: float = 0.01,
    tolerance: float = 1e-3,
    gamma: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Computes the sparsity-constrained transport plan (Liu et al., arXiv 2209.15466, section 4).

    Maximises the semi-dual over one potential per token, starting from 0. The columns of the plan are k-sparse
    projections: after any number of iterations they sum to n/E, n the number of real tokens, and have at most `k`
    non-zeros. Rows converge towards 1.

    Args:
        similarity: [G, T, E] floating point. A row of -inf marks a masked token.
        k: The most tokens per expert, 1 <= k <= T (0 where T is 0).
        iterations: The most steps of the solver.
        solver: "adam" (betas 0.9 and 0.999, eps 1e-8), which the router uses, or "lbfgs" for converged plans, which
            needs a few hundred iterations. For k < T the semi-dual has kinks, where L-BFGS may stop before rows sum
            to 1.
        learning_rate: Learning rate of Adam.
        tolerance: Stops a group when the norm of its gradient is at most this.
        gamma: Strength of the quadratic regularisation.
        mask: [G, T] bool, True = real token. Masked tokens get 0 and do not count in n.

    Returns:
        The plan, [G, T, E] in similarity's dtype. A group with NaN or +inf gets NaN. The gradient flows through the
            projections, not through the potentials.
    """
    similarity = check.floating("similarity", similarity, "G T E")
    k = check.integer("k", k, min(1, similarity.shape[1]), similarity.shape[1])
    iterations = check.integer("iterations", iterations, 0)
    check.choice("solver", solver, SOLVERS)
    learning_rate = check.number("learning_rate", learning_rate)
    tolerance = check.number("tolerance", tolerance, zero=True)
    gamma = check.number("gamma", gamma)
    if mask is not None:
        mask = check.mask(mask, "similarity", similarity)
    return ksparse_transport_unchecked(similarity, k, iterations, solver, learning_rate, tolerance, gamma, mask)


def ksparse_transport_unchecked(
    similarity: Tensor,
    k: int,
    iterations: int,
    solver: str,
    learning_rate: float,
    tolerance: float,
    gamma: float,
    mask: Tensor | None,
) -> Tensor:
    """Runs `ksparse_transport` without checks."""
    present = fill_masked(cast(similarity, compute_dtype(similarity.dtype)), mask)
    op = torch.ops.vmoe_routers.ksparse_transport.default
    plan = call(op, present, k, iterations, solver, learning_rate, tolerance, gamma)
    return cast(plan, similarity.dtype)


@torch.library.register_fake("vmoe_routers::ksparse_transport")
def _(
    similarity: Tensor,
    k: int,
    iterations: int,
    solver: str,
    learning_rate: float,
    tolerance: float,
    gamma: float,
) -> Tensor:
    return similarity.new_empty(similarity.shape)


def _setup_context(ctx, inputs, output):
    ctx.gamma = inputs[-1]
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    # plan = b P_k((alpha + S) / (gamma b)): the two factors b cancel in the gradient.
    (plan,) = ctx.saved_tensors
    grad_similarity = call(torch.ops.vmoe_routers.ksparse_projection_backward.default, grad, plan.detach())
    return grad_similarity / ctx.gamma, None, None, None, None, None, None


register_gradient("ksparse_transport", _backward, _setup_context)
