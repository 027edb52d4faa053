"""combine: the weighted sum of every token's slots."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, refuse_second_derivative, register_gradient
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype
from vmoe_routers.ops.dispatch import check_slots

check: Check = Check("combine")


def combine(y: Tensor, gate: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """Sums the slots of every token: ``out[g, t] = sum_s gate[g, s] y[s]`` over the slots s of t.

    Args:
        y: [E, G, C, D] floating point, the experts' outputs in the layout of `dispatch`.
        gate: [G, E, C] floating point, the weight of every slot.
        token: [G, E, C] int32, the token in every slot. A value outside [0, T) marks an empty slot.
        offsets, slots: Results of `invert_slots` for `token`. Offsets are clamped to [0, E * C]. Slots outside
            [0, E * C) are skipped.

    Returns:
        [G, T, D] in y's dtype, accumulated in float32 (float64 for float64). A token without a slot gets zeros.
    """
    y = check.floating("y", y, "E G C D")
    gate = check.floating("gate", gate)
    experts, groups, capacity, _ = y.shape
    tokens = check.tensor("offsets", offsets, "G T+1").shape[1] - 1
    check_slots(check, token, offsets, slots, (groups, experts, capacity), tokens)
    check.shape("gate", gate, (groups, experts, capacity), "G, E, C")
    check.device("gate", gate, "y", y)
    check.device("token", token, "y", y)
    return combine_unchecked(y, gate, token, offsets, slots)


def combine_unchecked(y: Tensor, gate: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """Runs `combine` without checks."""
    return call(torch.ops.vmoe_routers.combine.default, y, cast(gate, compute_dtype(y.dtype)), token, offsets, slots)


@torch.library.register_fake("vmoe_routers::combine")
def _(y: Tensor, gate: Tensor | None, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    return y.new_empty(offsets.shape[0], offsets.shape[1] - 1, y.shape[3])


@torch.library.register_fake("vmoe_routers::combine_backward")
def _(grad: Tensor, y: Tensor, gate: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, output):
    y, gate, *slots = inputs
    ctx.gated = gate is not None
    ctx.save_for_backward(*((y, gate) if ctx.gated else ()), *slots)


def _backward(ctx, grad):
    if not ctx.gated:
        return call(torch.ops.vmoe_routers.dispatch.default, grad, *ctx.saved_tensors), None, None, None, None
    y, gate, token, _, _ = ctx.saved_tensors
    grad_y, grad_gate = call(torch.ops.vmoe_routers.combine_backward.default, grad, y, gate, token)
    return grad_y, grad_gate, None, None, None


register_gradient("combine", _backward, _setup_context)
refuse_second_derivative("combine_backward")
