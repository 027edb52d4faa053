"""assign_slots: the position of every request in its expert's buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype

check: Check = Check("assign_slots")

MOST_EXPERTS = 2**20
"""Largest number of experts."""

MOST_EMPTY_SLOTS = 2**20
"""Number of slots that a group may have even with fewer requests. Empty slots cost memory and time."""


def assign_slots(
    expert: Tensor, num_experts: int, capacity: int, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fills the experts' buffers with the tokens' requests (V-MoE, arXiv 2106.05974, alg. 1, 2).

    First choices of all tokens are served before second choices, and so on. Within a choice, tokens are served in index
    order. With `priority` they are served in descending order of priority (batch prioritised routing), and tokens of
    equal priority in index order. A request for a full buffer is dropped.

    Args:
        expert: [G, T, K] int32, the expert of every request, in [0, E). Any other value, such as -1, is no request.
        num_experts: E, at most 2**20.
        capacity: C, slots per expert and group, at most ``max(T * K, 2**20 // E)``.
        priority: [G, T] floating point, or None.

    Returns:
        slot: [G, T, K] int32, ``e * C + position`` of every request, or -1 if it was dropped or is no request.
        source: [G, E, C] int32, ``t * K + k`` of the request in every slot, or -1 in an empty slot.
    """
    expert = check.tensor("expert", expert, "G T K")
    check.dtype("expert", expert, torch.int32)
    num_experts = check.integer("num_experts", num_experts, 1, MOST_EXPERTS)
    capacity = check.integer("capacity", capacity, 0)
    if priority is not None:
        priority = check.floating("priority", priority)
        check.shape("priority", priority, expert.shape[:2], "G, T")
        check.device("priority", priority, "expert", expert)
    return assign_slots_unchecked(expert, num_experts, capacity, priority)


def assign_slots_unchecked(
    expert: Tensor, num_experts: int, capacity: int, priority: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Runs `assign_slots`. Checks only the capacity."""
    if not torch.compiler.is_compiling():  # under torch.compile the comparison would specialise a symbolic size
        requests = expert.shape[1] * expert.shape[2]
        check.integer("capacity", capacity, 0, max(requests, MOST_EMPTY_SLOTS // num_experts))
    if priority is not None:
        priority = cast(priority.detach(), compute_dtype(priority.dtype))
    return torch.ops.vmoe_routers.assign_slots.default(expert, priority, num_experts, capacity)


@torch.library.register_fake("vmoe_routers::assign_slots")
def _(expert: Tensor, priority: Tensor | None, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    source = expert.new_empty(expert.shape[0], num_experts, capacity)
    return torch.empty_like(expert, memory_format=torch.contiguous_format), source
