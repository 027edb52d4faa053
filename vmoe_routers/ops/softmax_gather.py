"""softmax_gather: entries of the softmax over the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, refuse_second_derivative, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype

check: Check = Check("softmax_gather")


def softmax_gather(logits: Tensor, indices: Tensor, dim: int = 2) -> Tensor:
    """Gathers ``softmax(logits, -1)`` at `indices` without storing all gates [G, T, E].

    Forward reads the logits once and keeps two numbers per token for backward.

    Args:
        logits: [G, T, E] floating point. A token whose logits are all -inf is masked, and its gates are 0. A token
            with NaN or +inf has NaN gates.
        indices: int32. For dim 2 [G, T, K], experts of every token. For dim 1 [G, E, C], tokens of every expert. An
            index out of range gives 0.
        dim: 1 or 2.

    Returns:
        The gates, in the shape of `indices` and the dtype of `logits`.
    """
    logits = check.floating("logits", logits, "G T E")
    check.choice("dim", dim, (1, 2))
    indices = check.tensor("indices", indices, "G T K" if dim == 2 else "G E C")
    check.dtype("indices", indices, torch.int32)
    shape = (logits.shape[0], logits.shape[3 - dim], indices.shape[2])
    check.shape("indices", indices, shape, "G, T, K" if dim == 2 else "G, E, C")
    check.device("indices", indices, "logits", logits)
    return softmax_gather_unchecked(logits, indices, dim)


def softmax_gather_unchecked(logits: Tensor, indices: Tensor, dim: int) -> Tensor:
    """Runs `softmax_gather` without checks."""
    values, _ = call(
        torch.ops.vmoe_routers.softmax_gather.default, cast(logits, compute_dtype(logits.dtype)), indices, dim
    )
    return cast(values, logits.dtype)


@torch.library.register_fake("vmoe_routers::softmax_gather")
def _(logits: Tensor, indices: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(indices.shape), logits.new_empty(2, *logits.shape[:2])


@torch.library.register_fake("vmoe_routers::softmax_gather_backward")
def _(grad: Tensor, values: Tensor, logits: Tensor, indices: Tensor, norms: Tensor, dim: int) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, indices, ctx.dim = inputs
    values, norms = output
    ctx.mark_non_differentiable(norms)
    ctx.save_for_backward(values, logits, indices, norms)


def _backward(ctx, grad, _):
    return call(torch.ops.vmoe_routers.softmax_gather_backward.default, grad, *ctx.saved_tensors, ctx.dim), None, None


register_gradient("softmax_gather", _backward, _setup_context)
refuse_second_derivative("softmax_gather_backward")
