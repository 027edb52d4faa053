"""What a router did with its experts, as numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vmoe_routers.routers.routing import Routing


class Usage(NamedTuple):
    """The counts that metrics are computed from.

    Attributes:
        load: [G, E], how much every expert's buffer holds, in tokens.
        filled: [G, E], how many of its slots are filled.
        gates: [G, T, E], the weight of every expert in every token's output.
        dropped: [G, T] bool, True = a token that no expert took.
        requests: places asked for and places given, or None where tokens do not ask.
    """

    load: Tensor
    filled: Tensor
    gates: Tensor
    dropped: Tensor
    requests: tuple[Tensor, Tensor] | None = None


def metrics(routing: Routing) -> dict[str, Tensor]:
    """How `routing` used the experts; tensors without gradient.

    Returns:
        load [G, E]: tokens in every expert's buffer (Soft MoE: how much the tokens draw from it).
        utilisation: filled slots / slots.
        load_cv: coefficient of variation over experts of the load of all groups.
        entropy: mean over the tokens of the entropy of their gates over the experts, in nats.
        dropped: share of the tokens that no expert took.
        dead_experts: number of experts without load.
        dropped_requests (Token Choice): share of the requests that found no place.
    """
    with torch.no_grad():
        load, filled, gates, dropped, requests = routing.usage()
        total = load.sum(0)
        mean = total.mean().clamp(min=torch.finfo(total.dtype).tiny)
        share = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        slots = routing.num_groups * routing.num_experts * routing.capacity
        values = {
            "load": load,
            "utilisation": filled.sum() / max(slots, 1),
            "load_cv": total.std(correction=0) / mean,
            "entropy": _mean_over_tokens(-torch.xlogy(share, share).sum(-1), routing.mask),
            "dropped": _mean_over_tokens(dropped.to(load.dtype), routing.mask),
            "dead_experts": (total == 0).sum(),
        }
        if requests is not None:
            asked, given = requests
            values["dropped_requests"] = (asked - given) / asked.clamp(min=1)
        return values


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of values [G, T] over the real tokens."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
