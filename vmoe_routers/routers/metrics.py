"""Metrics of a routing: how a router used its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vmoe_routers.routers.routing import Routing


class Usage(NamedTuple):
    """Counts from which the metrics are computed.

    Attributes:
        load: [G, E], tokens in every expert's buffer. For Soft MoE, the sum of the tokens' weights of the expert.
        filled: [G, E], filled slots of every expert.
        gates: [G, T, E], the gates that weigh, also of experts that did not get the token. For `SoftRouting` and own
            routings, the weight of every expert in every token's output.
        dropped: [G, T] bool, True = a token that no expert took.
        requests: [G] and [G], the number of requests and of requests that got a slot. None if tokens make no requests.
    """

    load: Tensor
    filled: Tensor
    gates: Tensor
    dropped: Tensor
    requests: tuple[Tensor, Tensor] | None = None


def metrics(routing: Routing) -> dict[str, Tensor]:
    """Computes metrics of `routing` by name, as tensors without gradient.

    Returns:
        load: [G, E], tokens in every expert's buffer. For Soft MoE, the sum of the tokens' weights of the expert.
        utilisation: Filled slots over all slots.
        load_cv: Coefficient of variation over experts of the load of all groups.
        entropy: Entropy of a token's gates over the experts, in nats, mean over the tokens.
        dropped: Share of tokens that no expert took.
        dead_experts: Number of experts without load.
        dropped_requests: Share of requests that got no slot, only for Token Choice.
    """
    with torch.no_grad():
        load, filled, gates, dropped, requests = routing.usage()
        total = load.sum(0)
        mean = total.mean().clamp(min=torch.finfo(total.dtype).tiny)
        slots = routing.num_groups * routing.num_experts * routing.capacity
        values = {
            "load": load,
            "utilisation": filled.sum() / max(slots, 1),
            "load_cv": total.std(correction=0) / mean,
            "entropy": _mean_over_tokens(entropy(gates), routing.mask),
            "dropped": _mean_over_tokens(dropped.to(load.dtype), routing.mask),
            "dead_experts": (total == 0).sum(),
        }
        if requests is not None:
            asked, given = (count.sum() for count in requests)
            values["dropped_requests"] = (asked - given) / asked.clamp(min=1)
        return values


def entropy(gates: Tensor) -> Tensor:
    """Divides a token's gates [G, T, E] by their sum, and computes their entropy over the experts in nats, [G, T]."""
    share = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
    return -torch.xlogy(share, share).sum(-1)


def _mean_over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Averages `values` [G, T] over the real tokens."""
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)
