"""sinkhorn: the entropy-regularised transport plan between tokens and experts."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vmoe_routers.ops._call import call
from vmoe_routers.ops._checks import (
    cast,
    check_choice,
    check_floating,
    check_int,
    check_mask,
    check_positive,
    check_tensor,
    compute_dtype,
    fill_absent,
    refuse_second_derivative,
)

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
    """The plan of the transport between tokens (1 each) and experts (n/E each).

    Minimises ``<plan, -logits> + epsilon * sum(plan * (log(plan) - 1))`` by
    Sinkhorn's iterations in the log domain: the columns first, then the rows, so
    that rows sum to 1 and columns tend to n/E (Cuturi, arXiv 1306.0895; as a
    router S-BASE, arXiv 2202.01169).

    Args:
        logits: [G, T, E] floating point. A row of -inf alone is an absent token.
        epsilon: strength of the entropy; small values need more iterations.
        iterations: how many, or with a `tolerance` the most.
        tolerance: stop a group once its error (below) is at most this.
        mask: [G, T] bool, True = real token. Others get 0 and do not count in n.
        gradient: "unrolled", exact for the iterations done, or "implicit", of the
            fixed point at the plan reached.
        return_error: give the error and the iterations done as well.

    Returns:
        plan [G, T, E] in logits' dtype; with `return_error` also
        error [G] float64, ``max_e |sum_t plan - n/E| / (n/E)``, and
        iterations done [G] int32.
        A group with NaN or +inf gets a plan of NaN.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or number.
    """
    logits = check_floating("sinkhorn", "logits", check_tensor("sinkhorn", "logits", logits, "G T E"))
    epsilon = check_positive("sinkhorn", "epsilon", epsilon)
    iterations = check_int("sinkhorn", "iterations", iterations, 1)
    stop = 0.0 if tolerance is None else check_positive("sinkhorn", "tolerance", tolerance)
    check_choice("sinkhorn", "gradient", gradient, GRADIENTS)
    if mask is not None:
        mask = check_mask("sinkhorn", mask, "logits", logits)
    there = fill_absent(cast(logits, compute_dtype(logits.dtype)), mask)
    plan, _, error, steps = call(
        torch.ops.vmoe_routers.sinkhorn.default, there, epsilon, iterations, stop, gradient == "implicit"
    )
    plan = cast(plan, logits.dtype)
    return (plan, error, steps) if return_error else plan


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
    op = ops.sinkhorn_implicit_backward if ctx.implicit else ops.sinkhorn_backward
    return op(grad, *ctx.saved_tensors, ctx.epsilon), None, None, None, None


torch.library.register_autograd("vmoe_routers::sinkhorn", _backward, setup_context=_setup_context)
refuse_second_derivative("sinkhorn_backward")
refuse_second_derivative("sinkhorn_implicit_backward")
