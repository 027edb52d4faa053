"""dispatch: the rows of the tokens, laid out by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import (
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    check_tensor,
)


def check_slots(where: str, token: Tensor, offsets: Tensor, slots: Tensor, tokens: int) -> None:
    """token [G, E, C] and what `invert_slots` made of it, for T = `tokens`."""
    check_tensor(where, "token", token, "G E C")
    groups, experts, capacity = token.shape
    check_tensor(where, "offsets", offsets, "G T+1")
    check_tensor(where, "slots", slots, "G E*C")
    check_shape(where, "offsets", offsets, (groups, tokens + 1), "G, T + 1")
    check_shape(where, "slots", slots, (groups, experts * capacity), "G, E * C")
    for name, value in (("token", token), ("offsets", offsets), ("slots", slots)):
        check_dtype(where, name, value, torch.int32)
        check_device(where, name, value, "token", token)


def dispatch(x: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """Copies every slot's token: ``out[e, g, c] = x[g, token[g, e, c]]``, zeros where empty.

    Args:
        x: [G, T, D] floating point.
        token: [G, E, C] int32, the token in every slot; outside [0, T): empty.
        offsets, slots: `invert_slots` of `token`, for the gradient.

    Returns:
        [E, G, C, D], x's dtype: the rows of one expert are one matrix.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device.
    """
    x = check_floating("dispatch", "x", check_tensor("dispatch", "x", x, "G T D"))
    check_slots("dispatch", token, offsets, slots, x.shape[1])
    if token.shape[0] != x.shape[0]:
        raise ValueError(f"dispatch: token has {token.shape[0]} groups, x has {x.shape[0]}, wanted the same")
    check_device("dispatch", "token", token, "x", x)
    return torch.ops.vmoe_routers.dispatch(x, token, offsets, slots)


@torch.library.register_fake("vmoe_routers::dispatch")
def _(x: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    groups, experts, capacity = token.shape
    return x.new_empty(experts, groups, capacity, x.shape[2])


def _setup_context(ctx, inputs, output):
    _, *slots = inputs
    ctx.save_for_backward(*slots)


def _backward(ctx, grad):
    # Every gate 1: the rows that were copied from a token are summed into it.
    return torch.ops.vmoe_routers.combine(grad, None, *ctx.saved_tensors), None, None, None


torch.library.register_autograd("vmoe_routers::dispatch", _backward, setup_context=_setup_context)
