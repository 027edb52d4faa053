"""soft_mix: the two weighted means of Soft MoE."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._call import call
from vmoe_routers.ops._checks import (
    cast,
    check_choice,
    check_device,
    check_floating,
    check_shape,
    check_tensor,
    compute_dtype,
    product_dtype,
    refuse_second_derivative,
)


def soft_mix(logits: Tensor, values: Tensor, dim: int) -> Tensor:
    """Mixes `values` by a softmax of `logits` (arXiv 2308.00951, equations 1 to 3).

    ``dim = 1``: softmax over the tokens, every slot a mean of tokens.
    ``dim = 2``: softmax over all slots, every token a mean of slots.

    On CUDA values in 16 bits are mixed in 16 bits, with sums in float32: the softmax is float32's there too, and its
    weights are rounded to the values' dtype. Of float32 values the products are torch's, in TF32 where
    `torch.set_float32_matmul_precision` allows it; autocast does to them what it does to `torch.bmm`'s.

    Args:
        logits: [G, T, S], or [G, T, E, C] with S = E * C; floating point; -inf is "not there".
        values: for dim 1 tokens [G, T, D]; for dim 2 slots, [G, S, D] or [G, E, C, D] as
            the logits are. Floating point.
        dim: 1 or 2.

    Returns:
        For dim 1 slots, [G, S, D] or [G, E, C, D] as the logits are, for dim 2 tokens
        [G, T, D], in values' dtype (on CUDA under autocast in autocast's). A slot or token
        whose logits are all -inf gets zeros.
        Slots [G, E, C, D] are a view, the experts first in memory; such are also taken
        without a copy.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or dim.
    """
    logits = check_floating("soft_mix", "logits", logits)
    by_expert = logits.ndim == 4
    check_tensor("soft_mix", "logits", logits, "G T E C" if by_expert else "G T S")
    if by_expert and logits.shape[2] == 0:
        raise ValueError(f"soft_mix: logits must have at least one expert, got {list(logits.shape)}")
    values = check_floating("soft_mix", "values", values)
    check_choice("soft_mix", "dim", dim, (1, 2))
    axes = "G T D" if dim == 1 else "G E C D" if by_expert else "G S D"
    values = check_tensor("soft_mix", "values", values, axes)
    mixed = logits.shape[1:2] if dim == 1 else logits.shape[2:]
    check_shape("soft_mix", "values", values, (logits.shape[0], *mixed, values.shape[-1]), axes.replace(" ", ", "))
    check_device("soft_mix", "values", values, "logits", logits)
    if values.is_cuda and values.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        values = values.to(torch.get_autocast_dtype("cuda"))
    dtype = compute_dtype(torch.promote_types(logits.dtype, values.dtype))
    # One expert of S slots is [1, G, S, D] in memory: as the public [G, S, D].
    by_slot = logits if by_expert else logits.unsqueeze(2)
    mixing = values if dim == 1 else (values if by_expert else values.unsqueeze(1)).transpose(0, 1)
    out = call(
        torch.ops.vmoe_routers.soft_mix.default,
        cast(by_slot, dtype).flatten(2),
        cast(mixing, product_dtype(mixing, dtype)),
        dim,
        by_slot.shape[2],
    )
    out = cast(out, values.dtype)
    if dim == 2:
        return out
    return out.transpose(0, 1) if by_expert else out.squeeze(0)


@torch.library.register_fake("vmoe_routers::soft_mix")
def _(logits: Tensor, values: Tensor, dim: int, num_experts: int) -> Tensor:
    groups, tokens, slots = logits.shape
    shape = (num_experts, groups, slots // num_experts) if dim == 1 else (groups, tokens)
    return values.new_empty(*shape, values.shape[-1])


@torch.library.register_fake("vmoe_routers::soft_mix_backward")
def _(grad: Tensor, logits: Tensor, values: Tensor, dim: int, num_experts: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), values.new_empty(values.shape)


def _setup_context(ctx, inputs, output):
    logits, values, ctx.dim, ctx.num_experts = inputs
    ctx.save_for_backward(logits, values)


def _backward(ctx, grad):
    logits, values = ctx.saved_tensors
    grads = torch.ops.vmoe_routers.soft_mix_backward(grad, logits, values, ctx.dim, ctx.num_experts)
    return *grads, None, None


torch.library.register_autograd("vmoe_routers::soft_mix", _backward, setup_context=_setup_context)
refuse_second_derivative("soft_mix_backward")
