"""ksparse_projection: the projection onto the probability simplex with at most k non-zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype

check: Check = Check("ksparse_projection")


def ksparse_projection(x: Tensor, k: int) -> Tensor:
    """Finds the nearest point of the probability simplex with at most `k` non-zeros, along the last axis.

    Solves ``argmin |p - x|^2`` over ``p >= 0, sum(p) = 1, |p|_0 <= k``: the k largest entries (ties go to the lower
    index) are projected onto the simplex (Liu et al., arXiv 2209.15466, section 3). ``k = n`` gives the usual
    projection, ``k = 1`` a one-hot row.

    Args:
        x: [..., n] floating point, n >= 1.
        k: 1 <= k <= n.

    Returns:
        The projection, in x's shape and dtype. A row with NaN or +inf, or with only -inf, gets NaN. With ``g`` the
            gradient of the result, the gradient of x is ``g - mean(g)`` on the support and 0 elsewhere.
    """
    x = check.floating("x", x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"ksparse_projection: x must have a last axis of at least 1, got {list(x.shape)}")
    k = check.integer("k", k, 1, x.shape[-1])
    # reshape(-1, n) is ambiguous for a tensor without rows.
    rows = cast(x, compute_dtype(x.dtype)).reshape(x.shape[:-1].numel(), x.shape[-1])
    return cast(call(torch.ops.vmoe_routers.ksparse_projection.default, rows, k).reshape(x.shape), x.dtype)


@torch.library.register_fake("vmoe_routers::ksparse_projection")
def _(x: Tensor, k: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("vmoe_routers::ksparse_projection_backward")
def _(grad: Tensor, out: Tensor) -> Tensor:
    return out.new_empty(out.shape)


def _save_output(ctx, inputs, output):
    ctx.save_for_backward(output)


def _backward(ctx, grad):
    (out,) = ctx.saved_tensors
    op = torch.ops.vmoe_routers.ksparse_projection_backward.default
    return call(op, grad.unsqueeze(2), out.detach().unsqueeze(2)).squeeze(2), None


def _save_support(ctx, inputs, output):
    ctx.save_for_backward(inputs[1])


def _backward_twice(ctx, grad):
    # The first gradient is a symmetric linear map of its argument. The support is constant.
    (out,) = ctx.saved_tensors
    return call(torch.ops.vmoe_routers.ksparse_projection_backward.default, grad, out), None


register_gradient("ksparse_projection", _backward, _save_output)
register_gradient("ksparse_projection_backward", _backward_twice, _save_support)
