"""Gates [G, T, E]: the values that select tokens or experts, and the values that weigh them.

A router reads only the gates of chosen entries. `PlainGates` wraps a tensor. `SoftmaxGates` gives softmax(logits) at
the chosen entries and keeps no tensor of all gates.
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
    """Values [G, T, E] for every token and expert.

    Attributes:
        source: [G, T, E], the tensor from which the gates are computed. The gates have its dtype and device.
    """

    __slots__ = ()
    source: Tensor

    @abstractmethod
    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Selects the k largest gates in descending order, for every token (dim 2) or every expert (dim 1).

        Returns:
            Values, with a gradient, and int32 indices, [G, T, k] for dim 2 and [G, E, k] for dim 1. Where fewer than k
                entries are present, the remaining places have value 0 and index -1.
        """

    @abstractmethod
    def at(self, indices: Tensor, dim: int) -> Tensor:
        """Gathers the gates at indices in the layout of `choose`. Index -1 gives 0."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Computes all gates, [G, T, E]."""


class _Source(NamedTuple):
    source: Tensor


# Named tuples, so that code that walks over nested tensors (hooks, pytrees) finds the tensor.
class PlainGates(_Source, Gates):
    """Gates given as a tensor. -inf marks a masked entry."""

    __slots__ = ()

    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Selects by `ops.topk`."""
        values, indices = topk_unchecked(fill_masked(self.source, mask), k, dim)
        absent = values == -math.inf
        return values.masked_fill(absent, 0), indices.masked_fill(absent, -1)

    def at(self, indices: Tensor, dim: int) -> Tensor:
        """Gathers from the tensor."""
        values = self.source if dim == 2 else self.source.transpose(1, 2)
        return values.gather(2, indices.clamp(min=0).long()).masked_fill(indices < 0, 0)

    def dense(self) -> Tensor:
        """Returns the tensor."""
        return self.source


class SoftmaxGates(_Source, Gates):
    """Gates softmax(logits) over the experts, of which only the entries that are read are returned and kept."""

    __slots__ = ()

    def choose(self, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Selects by `ops.softmax_topk`."""
        return softmax_topk_unchecked(self.source, k, dim, mask)

    def at(self, indices: Tensor, dim: int) -> Tensor:
        """Gathers by `ops.softmax_gather`."""
        return softmax_gather_unchecked(self.source, indices, dim)

    def dense(self) -> Tensor:
        """Computes the whole softmax."""
        return self.source.softmax(-1)


def as_gates(values: Tensor | Gates) -> Gates:
    """Wraps a tensor in `PlainGates`. Returns a `Gates` unchanged."""
    return values if isinstance(values, Gates) else PlainGates(values)
