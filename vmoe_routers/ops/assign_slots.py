"""assign_slots: position of every request in its expert's buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import (
    cast,
    check_device,
    check_dtype,
    check_floating,
    check_int,
    check_shape,
    check_tensor,
    compute_dtype,
)

MOST_EXPERTS = 2**20
# Slots of a group at any number of tokens. Beyond the requests slots stay empty, and cost all the same.
MOST_EMPTY_SLOTS = 2**20


def assign_slots(
    expert: Tensor, num_experts: int, capacity: int, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fills the experts' buffers with the tokens' requests (V-MoE, arXiv 2106.05974, alg. 1, 2).

    Choice 1 of every token goes before choice 2 of any. Within a choice tokens go
    in index order, or in descending order of `priority` (batch prioritised
    routing), stable. A request that comes to a full buffer is dropped.

    Args:
        expert: [G, T, K] int32, the expert of every request, in [0, E). Anything
            else, such as -1, is no request.
        num_experts: E, at most 2**20.
        capacity: C, slots per expert and group. An expert cannot fill more than ``T * K``: at most
            ``max(T * K, 2**20 // E)``.
        priority: [G, T] floating point, or None.

    Returns:
        slot: [G, T, K] int32, ``e * C + position`` of every request, or -1.
        source: [G, E, C] int32, ``t * K + k`` of the request in every slot, or -1: empty.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or number.
    """
    expert = check_tensor("assign_slots", "expert", expert, "G T K")
    check_dtype("assign_slots", "expert", expert, torch.int32)
    num_experts = check_int("assign_slots", "num_experts", num_experts, 1, MOST_EXPERTS)
    capacity = check_int("assign_slots", "capacity", capacity, 0)
    if not torch.compiler.is_compiling():  # a traced size is a symbol, which a comparison would fix
        requests = expert.shape[1] * expert.shape[2]
        check_int("assign_slots", "capacity", capacity, 0, max(requests, MOST_EMPTY_SLOTS // num_experts))
    if priority is not None:
        priority = check_floating("assign_slots", "priority", priority)
        check_shape("assign_slots", "priority", priority, expert.shape[:2], "G, T")
        check_device("assign_slots", "priority", priority, "expert", expert)
        priority = cast(priority.detach(), compute_dtype(priority.dtype))
    return torch.ops.vmoe_routers.assign_slots.default(expert, priority, num_experts, capacity)


@torch.library.register_fake("vmoe_routers::assign_slots")
def _(expert: Tensor, priority: Tensor | None, num_experts: int, capacity: int):
    source = expert.new_empty(expert.shape[0], num_experts, capacity)
    return torch.empty_like(expert, memory_format=torch.contiguous_format), source
