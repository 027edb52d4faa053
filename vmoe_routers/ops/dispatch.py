"""dispatch: copies of the tokens, in the order of the slots."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, register_gradient
from vmoe_routers.ops._checks import Check

check: Check = Check("dispatch")


def check_slots(
    check: Check, token: Tensor, offsets: Tensor, slots: Tensor, shape: tuple[int, int, int], tokens: int
) -> None:
    """Checks `token` of `shape` [G, E, C], and `offsets` and `slots` of `invert_slots` for T = `tokens`."""
    groups, experts, capacity = shape
    check.shape("token", token, shape, "G, E, C")
    check.shape("offsets", offsets, (groups, tokens + 1), "G, T + 1")
    check.shape("slots", slots, (groups, experts * capacity), "G, E * C")
    check.dtype("token", token, torch.int32)
    check.dtype("offsets", offsets, torch.int32)
    check.dtype("slots", slots, torch.int32)
    check.device("offsets", offsets, "token", token)
    check.device("slots", slots, "token", token)


def dispatch(x: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """Copies the token of every slot: ``out[e, g, c] = x[g, token[g, e, c]]``. An empty slot gets zeros.

    Args:
        x: [G, T, D] floating point.
        token: [G, E, C] int32, the token in every slot. A value outside [0, T) marks an empty slot.
        offsets, slots: Results of `invert_slots` for `token`. Only the gradient uses them.

    Returns:
        [E, G, C, D] in x's dtype: the rows of one expert form one contiguous matrix.
    """
    x = check.floating("x", x, "G T D")
    groups, tokens, _ = x.shape
    _, experts, capacity = check.tensor("token", token, "G E C").shape
    check_slots(check, token, offsets, slots, (groups, experts, capacity), tokens)
    check.device("token", token, "x", x)
    return dispatch_unchecked(x, token, offsets, slots)


def dispatch_unchecked(x: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """Runs `dispatch` without checks."""
    return call(torch.ops.vmoe_routers.dispatch.default, x, token, offsets, slots)


@torch.library.register_fake("vmoe_routers::dispatch")
def _(x: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    groups, experts, capacity = token.shape
    return x.new_empty(experts, groups, capacity, x.shape[2])


def _setup_context(ctx, inputs, output):
    _, *slots = inputs
    ctx.save_for_backward(*slots)


def _backward(ctx, grad):
    # The gradient of a token is the sum over its slots: combine with gates of 1.
    return call(torch.ops.vmoe_routers.combine.default, grad, None, *ctx.saved_tensors), None, None, None


register_gradient("dispatch", _backward, _setup_context)
