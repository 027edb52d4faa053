"""soft_mix: the two softmax-weighted means of Soft MoE."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_routers.ops._autograd import call, refuse_second_derivative, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, product_dtype

check: Check = Check("soft_mix")


def soft_mix(logits: Tensor, values: Tensor, dim: int, num_experts: int = 1) -> Tensor:
    """Mixes `values` by a softmax of `logits` (arXiv 2308.00951, equations 1 to 3).

    ``dim = 1`` takes the softmax over the tokens: every slot is a weighted mean of tokens.
    ``dim = 2`` takes the softmax over all slots: every token is a weighted mean of slots.

    On CUDA, 16-bit values are multiplied in 16 bits and accumulated in float32: the softmax is computed in float32,
    and its weights are rounded to the values' dtype. Float32 values are multiplied by torch's products, in TF32 where
    `torch.set_float32_matmul_precision` allows it. Autocast applies to these products as to `torch.bmm`.

    Args:
        logits: [G, T, S] floating point, S = E * C, ordered by expert. -inf marks a masked token or slot.
        values: Floating point: tokens [G, T, D] for dim 1, slots [E, G, C, D] for dim 2.
        dim: 1 or 2.
        num_experts: E, used for dim 1. For dim 2 E is ``values.shape[0]``.

    Returns:
        Slots [E, G, C, D] for dim 1, tokens [G, T, D] for dim 2, in values' dtype (under CUDA's autocast, in autocast's
            dtype). A slot or token whose logits are all -inf gets zeros.
    """
    logits = check.floating("logits", logits, "G T S")
    check.choice("dim", dim, (1, 2))
    groups, tokens, slots = logits.shape
    if dim == 1:
        values = check.floating("values", values, "G T D")
        check.shape("values", values, (groups, tokens, values.shape[2]), "G, T, D")
        num_experts = check.integer("num_experts", num_experts, 1)
        if slots % num_experts:
            raise ValueError(f"soft_mix: num_experts must divide the {slots} slots of logits, got {num_experts}")
    else:
        values = check.floating("values", values, "E G C D")
        num_experts = values.shape[0]
        if num_experts == 0:
            raise ValueError(f"soft_mix: values must have at least one expert, got {list(values.shape)}")
        check.shape("values", values, (num_experts, groups, slots // num_experts, values.shape[3]), "E, G, C, D")
        if slots % num_experts:
            raise ValueError(f"soft_mix: values must have a number of experts that divides {slots}, got {num_experts}")
    check.device("values", values, "logits", logits)
    return soft_mix_unchecked(logits, values, dim, num_experts)


def soft_mix_unchecked(logits: Tensor, values: Tensor, dim: int, num_experts: int) -> Tensor:
    """Runs `soft_mix` without checks."""
    if values.is_cuda and values.dtype == torch.float32 and torch.is_autocast_enabled("cuda"):
        values = values.to(torch.get_autocast_dtype("cuda"))
    dtype = compute_dtype(torch.promote_types(logits.dtype, values.dtype))
    mixing = cast(values, product_dtype(values, dtype))
    op = torch.ops.vmoe_routers.soft_mix.default
    return cast(call(op, cast(logits, dtype), mixing, dim, num_experts), values.dtype)


@torch.library.register_fake("vmoe_routers::soft_mix")
def _(logits: Tensor, values: Tensor, dim: int, num_experts: int) -> Tensor:
    groups, tokens, slots = logits.shape
    shape = (num_experts, groups, slots // num_experts) if dim == 1 else (groups, tokens)
    return values.new_empty(*shape, values.shape[-1])


@torch.library.register_fake("vmoe_routers::soft_mix_backward")
def _(grad: Tensor, logits: Tensor, values: Tensor, dim: int, num_experts: int) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), values.new_empty(values.shape)


@register_flop_formula(torch.ops.vmoe_routers.soft_mix)
def _(logits: torch.Size, values: torch.Size, dim: int, num_experts: int, out_shape: object = None) -> int:
    return 2 * logits.numel() * values[-1]


@register_flop_formula(torch.ops.vmoe_routers.soft_mix_backward)
def _(
    grad: torch.Size, logits: torch.Size, values: torch.Size, dim: int, num_experts: int, out_shape: object = None
) -> int:
    return 4 * logits.numel() * values[-1]


def _setup_context(ctx, inputs, output):
    logits, values, ctx.dim, ctx.num_experts = inputs
    ctx.save_for_backward(logits, values)


def _backward(ctx, grad):
    logits, values = ctx.saved_tensors
    grads = call(torch.ops.vmoe_routers.soft_mix_backward.default, grad, logits, values, ctx.dim, ctx.num_experts)
    return *grads, None, None


register_gradient("soft_mix", _backward, _setup_context)
refuse_second_derivative("soft_mix_backward")
