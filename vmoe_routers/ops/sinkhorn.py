"""sinkhorn: the entropy-regularised transport plan between tokens and experts."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, refuse_second_derivative, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, fill_masked

check: Check = Check("sinkhorn")

Gradient = Literal["unrolled", "implicit"]
GRADIENTS = ("unrolled", "implicit")


@overload
def sinkhorn(
    logits: Tensor,
    *,
    epsilon: float = ...,
    iterations: int = ...,
    tolerance: float | None = ...,
    mask: Tensor | None = ...,
    gradient: Gradient = ...,
    return_error: Literal[False] = ...,
) -> Tensor: ...
@overload
def sinkhorn(
    logits: Tensor,
    *,
    epsilon: float = ...,
    iterations: int = ...,
    tolerance: float | None = ...,
    mask: Tensor | None = ...,
    gradient: Gradient = ...,
    return_error: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
def sinkhorn(
    logits: Tensor,
    *,
    epsilon: float = 1.0,
    iterations: int = 20,
    tolerance: float | None = None,
    mask: Tensor | None = None,
    gradient: Gradient = "unrolled",
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Computes the entropy-regularised transport plan between tokens (mass 1 each) and experts (mass n/E each).

    Minimises ``<plan, -logits> + epsilon * sum(plan * (log(plan) - 1))`` by Sinkhorn's iterations (Cuturi,
    arXiv 1306.0895; used as the router S-BASE in arXiv 2202.01169). An iteration scales the columns, then the rows:
    rows sum to 1, and columns converge to n/E, n the number of real tokens. Logits with a large spread are iterated on
    logarithms, so no exponential overflows.

    Args:
        logits: [G, T, E] floating point. A row of -inf marks a masked token.
        epsilon: Strength of the entropy. Small values need more iterations.
        iterations: Number of iterations. With `tolerance`, the largest number.
        tolerance: Stops a group when its error, defined under Returns, is at most this.
        mask: [G, T] bool, True = real token. Masked tokens get 0 and do not count in n.
        gradient: "unrolled": exact gradient of the iterations done. "implicit": gradient of the fixed point, computed
            at the plan after the last iteration.
        return_error: Also returns the error and the number of iterations.

    Returns:
        The plan, [G, T, E] in logits' dtype. With `return_error` a tuple of the plan, the error
            ``max_e |sum_t plan - n/E| / (n/E)``, [G] float64, and the iterations done, [G] int32. A group with NaN or
            +inf, or whose logits / epsilon overflow float64, gets a plan of NaN.
    """
    logits = check.floating("logits", logits, "G T E")
    epsilon = check.number("epsilon", epsilon)
    iterations = check.integer("iterations", iterations, 1)
    tolerance = None if tolerance is None else check.number("tolerance", tolerance)
    check.choice("gradient", gradient, GRADIENTS)
    if mask is not None:
        mask = check.mask(mask, "logits", logits)
    result = sinkhorn_unchecked(logits, epsilon, iterations, tolerance, mask, gradient)
    return result if return_error else result[0]


def sinkhorn_unchecked(
    logits: Tensor, epsilon: float, iterations: int, tolerance: float | None, mask: Tensor | None, gradient: Gradient
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `sinkhorn` without checks. Gives plan, error and iterations done."""
    present = fill_masked(cast(logits, compute_dtype(logits.dtype)), mask)
    plan, _, error, steps = call(
        torch.ops.vmoe_routers.sinkhorn.default, present, epsilon, iterations, tolerance or 0.0, gradient == "implicit"
    )
    return cast(plan, logits.dtype), error, steps


@torch.library.register_fake("vmoe_routers::sinkhorn")
def _(logits: Tensor, epsilon: float, iterations: int, tolerance: float, implicit: bool):
    groups, _, experts = logits.shape
    return (
        logits.new_empty(logits.shape),
        logits.new_empty((groups, iterations, experts), dtype=torch.float64),
        logits.new_empty(groups, dtype=torch.float64),
        logits.new_empty(groups, dtype=torch.int32),
    )


@torch.library.register_fake("vmoe_routers::sinkhorn_backward")
def _(grad: Tensor, logits: Tensor, history: Tensor, steps: Tensor, epsilon: float) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.register_fake("vmoe_routers::sinkhorn_implicit_backward")
def _(grad: Tensor, plan: Tensor, epsilon: float) -> Tensor:
    return plan.new_empty(plan.shape)


def _setup_context(ctx, inputs, output):
    logits, ctx.epsilon, _, _, ctx.implicit = inputs
    plan, history, error, steps = output
    ctx.mark_non_differentiable(history, error, steps)
    ctx.save_for_backward(*((plan,) if ctx.implicit else (logits, history, steps)))


def _backward(ctx, grad, *_):
    ops = torch.ops.vmoe_routers
    op = (ops.sinkhorn_implicit_backward if ctx.implicit else ops.sinkhorn_backward).default
    return call(op, grad, *ctx.saved_tensors, ctx.epsilon), None, None, None, None


register_gradient("sinkhorn", _backward, _setup_context)
refuse_second_derivative("sinkhorn_backward")
refuse_second_derivative("sinkhorn_implicit_backward")
