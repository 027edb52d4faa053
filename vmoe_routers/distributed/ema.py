"""Ema: exponential moving average of a model's values, under every layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.distributed.clip import local


class Ema:
    """Exponential moving average of the parameters and buffers of a model. Each rank averages the part that it has.

    Make the average after `parallelize`. The average keeps tensors, not a copy of the model, because FSDP2 refuses
    copies.

    Args:
        model: The model.
        decay: Weight of the average in an update, in [0, 1].

    Attributes:
        decay: May be changed between updates.
        values: The averages by the names of `model.state_dict()`, sharded like the model.
    """

    def __init__(self, model: nn.Module, decay: float):
        if not 0 <= decay <= 1:
            raise ValueError(f"Ema: decay must be in [0, 1], got {decay}")
        self.decay = decay
        self.values: dict[str, Tensor] = {name: value.clone() for name, value in _state(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Moves the averages towards the values of `model`: ``decay * average + (1 - decay) * value``.

        Integers and bools are copied.
        """
        state = _state(model)
        averages, values = [], []
        for name, average in self.values.items():
            if average.is_floating_point():
                averages.append(local(average))
                values.append(local(state[name]))
            else:
                average.copy_(state[name])
        torch._foreach_lerp_(averages, values, 1 - self.decay)  # type: ignore[attr-defined]

    @contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Gives `model` the averages, in place, within the context. Do not call `update` within the context."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: nn.Module) -> None:
        seen: set[int] = set()
        for name, value in _state(model).items():
            average, value = local(self.values[name]), local(value)
            if value.data_ptr() in seen:  # a tied parameter, which has two names
                continue
            seen.add(value.data_ptr())
            kept = value.clone()
            value.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Gives the averages, which `torch.distributed.checkpoint` can save and load in place."""
        return dict(self.values)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies averages that have the same layout.

        Raises:
            ValueError: The names differ.
        """
        if state.keys() != self.values.keys():
            names = ", ".join(sorted(state.keys() ^ self.values.keys()))
            raise ValueError(f"Ema: the state must have the names of the model's state, they differ in {names}")
        for name, average in self.values.items():
            average.copy_(state[name])


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Gives the parameters and buffers of the model. `state_dict` first makes FSDP2 shard gathered parameters again."""
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}
