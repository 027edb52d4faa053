"""invert_slots: from the token of a slot to the slots of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import Check

check = Check("invert_slots")


def invert_slots(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The slots of every token, for `dispatch` and `combine`, and how many of an expert's slots to compute.

    Args:
        token: [G, E, C] int32, the token in every slot; outside [0, T): empty.
        num_tokens: T.

    Returns:
        offsets: [G, T + 1] int32; the slots of token t are ``slots[offsets[t] : offsets[t + 1]]``.
        slots: [G, E * C] int32, ``e * C + c``, ascending within a token; -1 after the last.
        filled: [G, E] int32, 1 + the position of an expert's last slot that is not empty, or 0.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or number.
    """
    token = check.tensor("token", token, "G E C")
    check.dtype("token", token, torch.int32)
    num_tokens = check.integer("num_tokens", num_tokens, 0)
    return invert_slots_unchecked(token, num_tokens)


def invert_slots_unchecked(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """`invert_slots` of arguments known to be right."""
    return torch.ops.vmoe_routers.invert_slots.default(token, num_tokens)


@torch.library.register_fake("vmoe_routers::invert_slots")
def _(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    groups, experts, capacity = token.shape
    offsets, slots = token.new_empty(groups, num_tokens + 1), token.new_empty(groups, experts * capacity)
    return offsets, slots, token.new_empty(groups, experts)
