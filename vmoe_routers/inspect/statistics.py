"""RoutingStatistics: metrics of the MoE layers of a model over many batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.inspect.record import plain_name, record
from vmoe_routers.inspect.sums import COUNTS, metrics_of, sums_of
from vmoe_routers.inspect.trace import Trace
from vmoe_routers.moe import MoEMlp


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
        layers = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, MoEMlp)}
        self.experts: dict[str, int] = {name: int(layer.router.num_experts) for name, layer in layers.items()}  # type: ignore[arg-type]
        self.sums: Tensor = torch.zeros(
            1 + sum(count + COUNTS for count in self.experts.values()), dtype=torch.float64, device=device
        )

    @contextmanager
    def recording(self, valid: Tensor) -> Iterator[None]:
        """Adds the routings of a forward within the context.

        Args:
            valid: [B] bool, True for images that count, False for padding. A group with images of both kinds is
                weighted by its share of valid images.
        """
        if not self.experts:
            yield
            return
        with record(self.model, eager=False) as trace:
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
                part += sums_of(routing, here.view(shape))

    def _split(self) -> tuple[Tensor, ...]:
        """Returns views of `sums`: the number of images, and the sums of every layer."""
        return self.sums.split([1, *(count + COUNTS for count in self.experts.values())])

    def layers(self) -> dict[str, dict[str, Any]]:
        """Computes the metrics of every recorded layer, by the name of the layer, as Python numbers.

        Returns:
            For every layer, `load`, the list of tokens per image in every expert's buffer, and the other metrics of
                `vmoe_routers.routers.metrics.metrics` over all images.
        """
        images, *parts = self._split()
        named = zip(self.experts, parts, strict=True)
        return {name: metrics_of(part, images) for name, part in named if part.any()}
