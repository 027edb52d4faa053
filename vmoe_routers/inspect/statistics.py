"""RoutingStatistics: metrics of the MoE layers of a model over many batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.inspect.record import Trace, record
from vmoe_routers.moe import MoEMlp
from vmoe_routers.routers import Routing
from vmoe_routers.routers.metrics import entropy

_COUNTS = 7  # filled, slots, entropy, dropped, tokens, asked, given


class RoutingStatistics:
    """Sums over images, for the routing metrics of every MoE layer. Adding never waits for the device.

    Args:
        model: A module with any number of MoE layers. Layers that torch.compile has compiled are not recorded.
        device: Device of the sums.

    Attributes:
        sums: [N] float64. The sums of several processes can be added.
    """

    def __init__(self, model: nn.Module, device: torch.device | str):
        self.model = model
        layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEMlp)}
        self.experts = {name: int(layer.router.num_experts) for name, layer in layers.items()}  # type: ignore[arg-type]
        self.sums = torch.zeros(
            1 + sum(count + _COUNTS for count in self.experts.values()), dtype=torch.float64, device=device
        )

    @contextmanager
    def recording(self, valid: Tensor) -> Iterator[None]:
        """Adds the routings of a forward within the context.

        Args:
            valid: [B] bool, True for images that count, False for padding. A group with both has the weight of its
                share of valid images.
        """
        if not self.experts:
            yield
            return
        with record(self.model) as trace:
            yield
        self._add(trace, valid.double())

    @torch.no_grad()
    def _add(self, trace: Trace, weights: Tensor) -> None:
        images, *parts = self._split()
        images += weights.sum()
        for routings, part in zip(trace.routings.values(), parts, strict=True):
            tokens = sum(routing.num_groups * routing.num_tokens for routing in routings)
            # The tokens of an image are contiguous, also where a last, smaller group has a separate routing.
            by_token = weights.repeat_interleave(tokens // len(weights))
            for routing in routings:
                shape = routing.num_groups, routing.num_tokens
                here, by_token = by_token[: shape[0] * shape[1]], by_token[shape[0] * shape[1] :]
                part += _sums(routing, here.view(shape))

    def _split(self) -> tuple[Tensor, ...]:
        """Returns views of `sums`: the number of images, and the sums of every layer."""
        return self.sums.split([1, *(count + _COUNTS for count in self.experts.values())])

    def layers(self) -> dict[str, dict[str, Any]]:
        """Computes the metrics of every recorded layer, by the name of the layer, as Python numbers.

        Returns:
            For every layer, `load`, the list of tokens per image in every expert's buffer, and the other metrics of
            `vmoe_routers.routers.metrics.metrics` over all images.
        """
        (images, *parts), found = self._split(), {}
        for (name, count), part in zip(self.experts.items(), parts, strict=True):
            load = part[:count] / images
            filled, slots, nats, dropped, tokens, asked, given = part[count:].tolist()
            if tokens == 0:
                continue
            found[name] = {
                "load": load.tolist(),
                "utilisation": filled / slots if slots else 0.0,
                "load_cv": float(load.std(correction=0) / load.mean()) if load.any() else 0.0,
                "entropy": nats / tokens,
                "dropped": dropped / tokens,
                "dead_experts": int((load == 0).sum()),
            }
            if asked:
                found[name]["dropped_requests"] = (asked - given) / asked
        return found


def _sums(routing: Routing, weights: Tensor) -> Tensor:
    """Computes the sums [E + 7] of a routing whose tokens have weights [G, T]."""
    usage = routing.usage()
    if routing.mask is not None:
        weights = weights * routing.mask
    groups = weights.mean(1)
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
