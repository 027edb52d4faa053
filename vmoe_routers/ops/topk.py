"""topk: the k largest entries along an axis, with defined ties."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype

check: Check = Check("topk")


def topk(x: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Selects the `k` largest entries of `x` along `dim`, in descending order.

    Ties go to the lower index on every device, unlike in `torch.topk`. NaN counts as the largest value, as in
    `torch.sort`, so the indices are unique and in range for any input.

    Args:
        x: Floating point, any shape with at least one axis.
        k: 1 <= k <= ``x.shape[dim]`` (0 where that axis is empty).
        dim: The axis to select along.

    Returns:
        Values, in x's dtype, and indices, int32, both of shape ``x.movedim(dim, -1).shape[:-1] + (k,)``: the selected
            axis goes last. The gradient of the values flows to the selected entries.
    """
    x = check.floating("x", x)
    if x.ndim == 0:
        raise ValueError("topk: x must have at least one axis, got a scalar")
    dim = check.integer("dim", dim, -x.ndim, x.ndim - 1) % x.ndim
    k = check.integer("k", k, min(1, x.shape[dim]), x.shape[dim])
    return topk_unchecked(x, k, dim)


def topk_unchecked(x: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    """Runs `topk` without checks. Requires ``dim >= 0``."""
    values, indices = call(torch.ops.vmoe_routers.topk.default, cast(x, compute_dtype(x.dtype)), k, dim)
    return cast(values, x.dtype), indices


@torch.library.register_fake("vmoe_routers::topk")
def _(x: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor]:
    shape = [*x.shape[:dim], *x.shape[dim + 1 :], k]
    return x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)


def _setup_context(ctx, inputs, output):
    x, _, ctx.dim = inputs
    ctx.shape = x.shape
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _backward(ctx, grad, _):
    (indices,) = ctx.saved_tensors
    size = ctx.shape[ctx.dim]
    grad_x = grad.new_zeros([*grad.shape[:-1], size]).scatter(-1, indices.long(), grad)
    return grad_x.movedim(-1, ctx.dim), None, None


register_gradient("topk", _backward, _setup_context)
