"""Sums over tokens and slots, from which the metrics of many routings are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vmoe_routers.routers import Routing
from vmoe_routers.routers.metrics import entropy

COUNTS = 7  # filled, slots, entropy, dropped, tokens, asked, given


def sums_of(routing: Routing, weights: Tensor) -> Tensor:
    """Computes the sums [E + COUNTS] of a routing: the load of every expert, and the counts.

    Args:
        routing: The routing.
        weights: [G, T] float64, the weights of the tokens. Masked tokens do not count.
    """
    usage = routing.usage()
    groups = weights.mean(1)  # loads and slots are per group, and leave out masked tokens already
    if routing.mask is not None:
        weights = weights * routing.mask
    asked, given = usage.requests if usage.requests is not None else groups.new_zeros(2, routing.num_groups)
    slots = groups.sum() * (routing.num_experts * routing.capacity)
    counts = [
        groups @ usage.filled.sum(1).double(),
        slots,
        (weights * entropy(usage.gates)).sum(),
        (weights * usage.dropped).sum(),
        weights.sum(),
        groups @ asked.double(),
        groups @ given.double(),
    ]
    return torch.cat([groups @ usage.load.double(), torch.stack(counts)])


def metrics_of(sums: Tensor, images: Tensor | int) -> dict[str, Any]:
    """Computes metrics from sums of `sums_of`, as Python numbers. Gives zeros if no token counts.

    Args:
        sums: [E + COUNTS].
        images: The number of images.

    Returns:
        `load`, the list of tokens per image in every expert's buffer, and the other metrics of
            `vmoe_routers.routers.metrics.metrics`.
    """
    load = sums[:-COUNTS] / images
    filled, slots, nats, dropped, tokens, asked, given = sums[-COUNTS:].tolist()
    found = {
        "load": load.tolist(),
        "utilisation": filled / slots if slots else 0.0,
        "load_cv": float(load.std(correction=0) / load.mean()) if load.any() else 0.0,
        "entropy": nats / tokens if tokens else 0.0,
        "dropped": dropped / tokens if tokens else 0.0,
        "dead_experts": int((load == 0).sum()),
    }
    if asked:
        found["dropped_requests"] = (asked - given) / asked
    return found
