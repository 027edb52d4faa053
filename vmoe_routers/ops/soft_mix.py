"""soft_mix: the two weighted means of Soft MoE."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import (
    check_choice,
    check_device,
    check_floating,
    check_shape,
    check_tensor,
    compute_dtype,
    refuse_second_derivative,
    without_autocast,
)


def soft_mix(logits: Tensor, values: Tensor, dim: int) -> Tensor:
    """Mixes `values` by a softmax of `logits` (arXiv 2308.00951, equations 1 to 3).

    ``dim = 1``: softmax over the tokens, every slot a mean of tokens.
    ``dim = 2``: softmax over the slots, every token a mean of slots.

    Args:
        logits: [G, T, S] floating point; -inf is "not there".
        values: [G, T, D] for dim 1, [G, S, D] for dim 2, floating point.
        dim: 1 or 2.

    Returns:
        [G, S, D] for dim 1, [G, T, D] for dim 2, in values' dtype. A slot or token
        whose logits are all -inf gets zeros.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or dim.
    """
    logits = check_floating("soft_mix", "logits", check_tensor("soft_mix", "logits", logits, "G T S"))
    values = check_floating("soft_mix", "values", values)
    check_choice("soft_mix", "dim", dim, (1, 2))
    values = check_tensor("soft_mix", "values", values, "G T D" if dim == 1 else "G S D")
    shape = (logits.shape[0], logits.shape[dim], values.shape[2])
    check_shape("soft_mix", "values", values, shape, "G, T, D" if dim == 1 else "G, S, D")
    check_device("soft_mix", "values", values, "logits", logits)
    dtype = compute_dtype(torch.promote_types(logits.dtype, values.dtype))
    # The kernel's products are torch's, which autocast would make bfloat16.
    with without_autocast(values):
        out = torch.ops.vmoe_routers.soft_mix(logits.to(dtype), values.to(dtype), dim)
    return out.to(values.dtype)


@torch.library.register_fake("vmoe_routers::soft_mix")
def _(logits: Tensor, values: Tensor, dim: int) -> Tensor:
    return values.new_empty(logits.shape[0], logits.shape[3 - dim], values.shape[2])


@torch.library.register_fake("vmoe_routers::soft_mix_backward")
def _(grad: Tensor, logits: Tensor, values: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), values.new_empty(values.shape)


def _setup_context(ctx, inputs, output):
    logits, values, ctx.dim = inputs
    ctx.save_for_backward(logits, values)


def _backward(ctx, grad):
    logits, values = ctx.saved_tensors
    with without_autocast(values):
        return *torch.ops.vmoe_routers.soft_mix_backward(grad, logits, values, ctx.dim), None


torch.library.register_autograd("vmoe_routers::soft_mix", _backward, setup_context=_setup_context)
refuse_second_derivative("soft_mix_backward")
