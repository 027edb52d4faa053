"""dispatch: the rows of the tokens, laid out by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._call import call
from vmoe_routers.ops._checks import (
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    check_tensor,
)


def check_slots(
    where: str, token: Tensor, offsets: Tensor, slots: Tensor, shape: tuple[int, int, int], tokens: int
) -> None:
    """token of this shape [G, E, C], and what `invert_slots` made of it, for T = `tokens`."""
    groups, experts, capacity = shape
    check_shape(where, "token", token, shape, "G, E, C")
    check_shape(where, "offsets", offsets, (groups, tokens + 1), "G, T + 1")
    check_shape(where, "slots", slots, (groups, experts * capacity), "G, E * C")
    check_dtype(where, "token", token, torch.int32)
    check_dtype(where, "offsets", offsets, torch.int32)
    check_dtype(where, "slots", slots, torch.int32)
    check_device(where, "offsets", offsets, "token", token)
    check_device(where, "slots", slots, "token", token)


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
    groups, tokens, _ = x.shape
    _, experts, capacity = check_tensor("dispatch", "token", token, "G E C").shape
    check_slots("dispatch", token, offsets, slots, (groups, experts, capacity), tokens)
    check_device("dispatch", "token", token, "x", x)
    return call(torch.ops.vmoe_routers.dispatch.default, x, token, offsets, slots)


@torch.library.register_fake("vmoe_routers::dispatch")
def _(x: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    groups, experts, capacity = token.shape
    return x.new_empty(experts, groups, capacity, x.shape[2])


def _setup_context(ctx, inputs, output):
    _, *slots = inputs
    ctx.save_for_backward(*slots)


def _backward(ctx, grad):
    # Every gate 1: the rows that were copied from a token are summed into it.
    return torch.ops.vmoe_routers.combine.default(grad, None, *ctx.saved_tensors), None, None, None


torch.library.register_autograd("vmoe_routers::dispatch", _backward, setup_context=_setup_context)
