"""assign_slots: position of every request in its expert's buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype

check = Check("assign_slots")

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
    """`assign_slots` of arguments known to be right, but for a capacity beyond what the requests can fill."""
    if not torch.compiler.is_compiling():  # a comparison would specialise a symbolic size
        requests = expert.shape[1] * expert.shape[2]
        check.integer("capacity", capacity, 0, max(requests, MOST_EMPTY_SLOTS // num_experts))
    if priority is not None:
        priority = cast(priority.detach(), compute_dtype(priority.dtype))
    return torch.ops.vmoe_routers.assign_slots.default(expert, priority, num_experts, capacity)


@torch.library.register_fake("vmoe_routers::assign_slots")
def _(expert: Tensor, priority: Tensor | None, num_experts: int, capacity: int):
    source = expert.new_empty(expert.shape[0], num_experts, capacity)
    return torch.empty_like(expert, memory_format=torch.contiguous_format), source
