"""softmax_topk: the k largest entries along one axis of a softmax over the experts."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, fill_masked

check: Check = Check("softmax_topk")


def softmax_topk(logits: Tensor, k: int, dim: int = 2, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Selects the `k` largest entries of ``softmax(logits, -1)`` along `dim`, in descending order.

    ``dim = 2`` selects experts for every token (Token Choice, arXiv 2106.05974, section 2.2).
    ``dim = 1`` selects tokens for every expert (Expert Choice, arXiv 2202.09368, section 3.2).

    The gates [G, T, E] are not stored for dim 2, and never kept for backward. Gates are compared as computed, in
    float64 for float64 logits and else in float32. Ties go to the lower index, and NaN counts as the largest value.

    Args:
        logits: [G, T, E] floating point. A token whose logits are all -inf is masked. A token with NaN or +inf has
            NaN gates.
        k: 1 <= k <= ``logits.shape[dim]`` (0 where that axis is empty).
        dim: 1 or 2.
        mask: [G, T] bool, True = real token.

    Returns:
        Values, in the logits' dtype, and indices, int32, both [G, T, k] for dim 2 and [G, E, k] for dim 1. Masked
            tokens neither choose nor are chosen. Their entries have value 0 and index -1.
    """
    logits = check.floating("logits", logits, "G T E")
    check.choice("dim", dim, (1, 2))
    k = check.integer("k", k, min(1, logits.shape[dim]), logits.shape[dim])
    if mask is not None:
        mask = check.mask(mask, "logits", logits)
    return softmax_topk_unchecked(logits, k, dim, mask)


def softmax_topk_unchecked(logits: Tensor, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Runs `softmax_topk` without checks."""
    wide = fill_masked(cast(logits, compute_dtype(logits.dtype)), mask)
    values, indices, _ = call(torch.ops.vmoe_routers.softmax_topk.default, wide, k, dim)
    return cast(values, logits.dtype), indices


@torch.library.register_fake("vmoe_routers::softmax_topk")
def _(logits: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    shape = (logits.shape[0], logits.shape[3 - dim], k)
    norms = logits.new_empty(2, *logits.shape[:2])
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int32), norms


def _setup_context(ctx, inputs, output):
    logits, _, ctx.dim = inputs
    values, indices, norms = output
    ctx.mark_non_differentiable(indices, norms)
    ctx.save_for_backward(values, logits, indices, norms)


def _backward(ctx, grad, *_):
    return call(torch.ops.vmoe_routers.softmax_gather_backward.default, grad, *ctx.saved_tensors, ctx.dim), None, None


register_gradient("softmax_topk", _backward, _setup_context)
