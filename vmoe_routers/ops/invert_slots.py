"""invert_slots: the slots of every token, from the token of every slot."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import Check

check: Check = Check("invert_slots")


def invert_slots(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists the slots of every token, for `dispatch` and `combine`, and counts the slots to compute per expert.

    Args:
        token: [G, E, C] int32, the token in every slot. A value outside [0, T) marks an empty slot.
        num_tokens: T.

    Returns:
        offsets: [G, T + 1] int32. The slots of token t are ``slots[offsets[t] : offsets[t + 1]]``.
        slots: [G, E * C] int32, ``e * C + c``, ascending within a token, and -1 after the last filled slot.
        filled: [G, E] int32, the position after the last filled slot of every expert, or 0 if all are empty.
    """
    token = check.tensor("token", token, "G E C")
    check.dtype("token", token, torch.int32)
    num_tokens = check.integer("num_tokens", num_tokens, 0)
    return invert_slots_unchecked(token, num_tokens)


def invert_slots_unchecked(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Runs `invert_slots` without checks."""
    return torch.ops.vmoe_routers.invert_slots.default(token, num_tokens)


@torch.library.register_fake("vmoe_routers::invert_slots")
def _(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    groups, experts, capacity = token.shape
    offsets, slots = token.new_empty(groups, num_tokens + 1), token.new_empty(groups, experts * capacity)
    return offsets, slots, token.new_empty(groups, experts)
