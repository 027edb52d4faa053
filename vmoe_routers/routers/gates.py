"""Gates [G, T, E]: the values that select tokens or experts, and the values that weigh them.

A router reads only the gates of what it chose. `PlainGates` wraps a tensor; `SoftmaxGates` computes softmax(logits)
at the chosen entries and never writes the whole tensor.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from vmoe_routers.ops._dtypes import fill_masked
from vmoe_routers.ops.softmax_gather import softmax_gather_unchecked
from vmoe_routers.ops.softmax_topk import softmax_topk_unchecked
from vmoe_routers.ops.topk import topk_unchecked


class Gates(ABC):
    """Values [G, T, E], token by expert.

    Attributes:
        source: [G, T, E], the tensor that the gates are computed from; it has their dtype and device.
    """

    __slots__ = ()
    source: Tensor

    @abstractmethod
    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k largest gates in descending order: of every token (dim 2) [G, T, k], of every expert (dim 1) [G, E, k].

        Returns:
            Values, with a gradient, and int32 indices; value 0 and index -1 where no entry is left to choose.
        """

    @abstractmethod
    def at(self, indices: Tensor, dim: int) -> Tensor:
        """The values at indices in the layout of `choose`; 0 at -1."""

    @abstractmethod
    def dense(self) -> Tensor:
        """All gates, [G, T, E]."""


class _Source(NamedTuple):
    source: Tensor


# Named tuples, so that whatever walks over nested tensors (hooks, pytrees) finds the tensor.
class PlainGates(_Source, Gates):
    """The tensor itself; -inf marks an absent entry."""

    __slots__ = ()

    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """By `ops.topk`."""
        values, indices = topk_unchecked(fill_masked(self.source, mask), k, dim)
        absent = values == -math.inf
        return values.masked_fill(absent, 0), indices.masked_fill(absent, -1)

    def at(self, indices: Tensor, dim: int) -> Tensor:
        """By gather."""
        values = self.source if dim == 2 else self.source.transpose(1, 2)
        return values.gather(2, indices.clamp(min=0).long()).masked_fill(indices < 0, 0)

    def dense(self) -> Tensor:
        """The tensor."""
        return self.source


class SoftmaxGates(_Source, Gates):
    """softmax(logits) over the experts, computed where it is read."""

    __slots__ = ()

    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """By `ops.softmax_topk`."""
        return softmax_topk_unchecked(self.source, k, dim, mask)

    def at(self, indices: Tensor, dim: int) -> Tensor:
        """By `ops.softmax_gather`."""
        return softmax_gather_unchecked(self.source, indices, dim)

    def dense(self) -> Tensor:
        """The whole softmax."""
        return self.source.softmax(-1)


def as_gates(values: Tensor | Gates) -> Gates:
    """`values`, a tensor wrapped in `PlainGates`."""
    return values if isinstance(values, Gates) else PlainGates(values)
