"""Gates [G, T, E]: what selects and what weighs, written out or in a form that need not be.

A router asks them for what it chose and never for all of them; a plain tensor will
do (`PlainGates`), and `SoftmaxGates` is softmax(logits) at the cost of reading the logits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from torch import Tensor

from vmoe_routers import ops
from vmoe_routers.ops._checks import fill_absent


class Gates(ABC):
    """Values [G, T, E], token by expert.

    Attributes:
        source: [G, T, E], the tensor that they are made of; of their dtype and device.
    """

    def __init__(self, source: Tensor):
        self.source = source

    @abstractmethod
    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k largest, in order: of every token (dim 2) [G, T, k], of every expert (dim 1) [G, E, k].

        Values, with a gradient, and int32 indices: 0 and -1 where nothing is there to be chosen.
        """

    @abstractmethod
    def at(self, indices: Tensor, dim: int) -> Tensor:
        """The values at indices as `choose` gives them; 0 at -1."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All of them, [G, T, E]."""


class PlainGates(Gates):
    """The gates are the tensor itself; -inf is "not there"."""

    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Gates.choose`."""
        values, indices = ops.topk(fill_absent(self.source, mask), k, dim)
        absent = values == -math.inf
        return values.masked_fill(absent, 0), indices.masked_fill(absent, -1)

    def at(self, indices: Tensor, dim: int) -> Tensor:
        """See `Gates.at`."""
        values = self.source if dim == 2 else self.source.transpose(1, 2)
        return values.gather(2, indices.clamp(min=0).long()).masked_fill(indices < 0, 0)

    def dense(self) -> Tensor:
        """See `Gates.dense`."""
        return self.source


class SoftmaxGates(Gates):
    """softmax(logits) over the experts, of which only what is asked for is written."""

    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """See `Gates.choose`."""
        return ops.softmax_topk(self.source, k, dim, mask=mask)

    def at(self, indices: Tensor, dim: int) -> Tensor:
        """See `Gates.at`."""
        return ops.softmax_gather(self.source, indices, dim)

    def dense(self) -> Tensor:
        """See `Gates.dense`."""
        return self.source.softmax(-1)


def as_gates(values: Tensor | Gates) -> Gates:
    """`values`, where it is a tensor as `PlainGates`."""
    return values if isinstance(values, Gates) else PlainGates(values)
