"""Routings: the two tensors of the formulation, dispatch and combine, and what they do.

Per group, with tokens X [T, D], a dispatch tensor D and a combine tensor B, both [T, E, C]
(section 3 of arXiv 2401.15969):

    expert inputs    X~[e, c] = sum_t D[t, e, c] X[t]
    layer output     Y[t]     = sum_{e, c} B[t, e, c] Y~[e, c]

A routing holds D and B in the form in which its router makes them, and not as dense tensors. Slots have one layout,
[E, G, C, D]: the rows of one expert are one matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import fill_masked
from vmoe_routers.ops.combine import combine_unchecked
from vmoe_routers.ops.dispatch import dispatch_unchecked
from vmoe_routers.ops.soft_mix import soft_mix_unchecked
from vmoe_routers.routers.gates import Gates
from vmoe_routers.routers.metrics import Usage, metrics

Losses = Mapping[str, Callable[[], Tensor]]
"""Auxiliary losses by name: functions that compute an unweighted scalar."""


class Routing(ABC):
    """What a router returns. A subclass has the attributes and the four methods; the other members follow from them.

    Attributes:
        num_groups, num_tokens, num_experts, capacity: G, T, E and C.
        device: of the routing's tensors.
        mask: [G, T] bool, True = real token, or None.
        filled: [G, E] int32: no slot of an expert's buffer from this position on holds a token. None: all slots count.
        loss_terms: the auxiliary losses, functions by name; none by default.
        loss_weights: their weights in `aux_loss`.
    """

    __slots__ = ()
    num_groups: int
    num_tokens: int
    num_experts: int
    capacity: int
    device: torch.device | None = None
    mask: Tensor | None = None
    filled: Tensor | None = None
    loss_terms: Losses = {}  # noqa: RUF012  (never written to)
    loss_weights: Mapping[str, float] = {}

    @abstractmethod
    def dispatch(self, x: Tensor) -> Tensor:
        """Expert inputs: tokens x [G, T, D] to slots [E, G, C, D], in x's dtype."""

    @abstractmethod
    def combine(self, y: Tensor) -> Tensor:
        """Layer output: the experts' outputs y [E, G, C, D] to tokens [G, T, D], in y's dtype."""

    @abstractmethod
    def dispatch_tensor(self) -> Tensor:
        """The dense dispatch tensor D, [G, T, E, C]."""

    @abstractmethod
    def combine_tensor(self) -> Tensor:
        """The dense combine tensor B, [G, T, E, C]."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses, unweighted scalars by name (`vmoe_routers.losses`), computed at every reading."""
        return {name: loss() for name, loss in self.loss_terms.items()}

    @property
    def aux_loss(self) -> Tensor:
        """The weighted sum of the losses, a scalar; only losses with a weight are computed."""
        weighted = [w * self.loss_terms[name]() for name, w in self.loss_weights.items() if w != 0]
        return sum(weighted[1:], weighted[0]) if weighted else torch.zeros((), device=self.device)

    @property
    def metrics(self) -> dict[str, Tensor]:
        """`vmoe_routers.routers.metrics.metrics` of this routing: load, utilisation, entropy, dropped tokens, ..."""
        return metrics(self)

    def usage(self) -> Usage:
        """The counts behind `metrics`, from the two dense tensors."""
        D, B = self.dispatch_tensor(), self.combine_tensor()
        taken = D.sum((2, 3))
        return Usage(D.sum((1, 3)), (D != 0).any(1).sum(-1), B.sum(-1), taken == 0)


def _check_rows(routing: Routing, method: str, name: str, value: Tensor, axes: str, beside: Tensor) -> None:
    check = Check(f"{type(routing).__name__}.{method}")
    check.floating(name, value, axes)
    G, T, E, C = routing.num_groups, routing.num_tokens, routing.num_experts, routing.capacity
    shape = (G, T) if axes == "G T D" else (E, G, C)
    if value.shape[:-1] != shape:
        check.shape(name, value, (*shape, value.shape[-1]), axes.replace(" ", ", "))
    check.device(name, value, "the routing", beside)


class _Sparse(NamedTuple):
    token: Tensor
    gate: Tensor
    gates: Gates
    offsets: Tensor
    slots: Tensor
    filled: Tensor
    expert: Tensor | None
    slot: Tensor | None
    mask: Tensor | None
    loss_terms: Losses
    loss_weights: Mapping[str, float]


# A named tuple, so that whatever walks over a module's outputs (hooks, pytrees, summaries) finds the tensors.
class SparseRouting(_Sparse, Routing):
    """A 0/1 dispatch tensor, held as the token and the gate of every slot.

    Attributes:
        token: [G, E, C] int32, the token in every slot, or -1: empty.
        gate: [G, E, C], its weight in the combine tensor, 0 where the slot is empty.
        gates: the `Gates` from which these weights were taken.
        offsets [G, T + 1], slots [G, E * C], filled [G, E]: `ops.invert_slots` of `token`, int32: the slots of every
            token, and the position after the last filled slot of every buffer.
        expert: [G, T, K] int32, the expert of every request (Token Choice), or None.
        slot: [G, T, K] int32, the slot of every request, -1: dropped (Token Choice), or None.
    """

    __slots__ = ()

    @property
    def num_groups(self) -> int:
        """G."""
        return self.token.shape[0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.gates.source.shape[1]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.token.shape[1]

    @property
    def capacity(self) -> int:
        """C."""
        return self.token.shape[2]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.token.device

    @property
    def weights(self) -> Tensor:
        """[G, T, E], the tensor from which the gates were taken; computed at every reading."""
        return self.gates.dense()

    def dispatch(self, x: Tensor) -> Tensor:
        """Tokens x [G, T, D] to slots [E, G, C, D]; an empty slot gets zeros."""
        _check_rows(self, "dispatch", "x", x, "G T D", self.gate)
        return dispatch_unchecked(x, self.token, self.offsets, self.slots)

    def combine(self, y: Tensor) -> Tensor:
        """Slots y [E, G, C, D] to tokens [G, T, D]; a token that no expert took gets zeros."""
        _check_rows(self, "combine", "y", y, "E G C D", self.gate)
        return combine_unchecked(y, self.gate, self.token, self.offsets, self.slots)

    def dispatch_tensor(self) -> Tensor:
        """The dense dispatch tensor [G, T, E, C], zeros and ones."""
        groups, experts, slots = self.token.shape
        # Empty slots are written to a row after the last token, which is cut off.
        dense = self.gate.new_zeros(groups, self.num_tokens + 1, experts, slots)
        row = torch.where(self.token < 0, self.num_tokens, self.token).long()
        return dense.scatter(1, row.unsqueeze(1), 1)[:, : self.num_tokens]

    def combine_tensor(self) -> Tensor:
        """The dense combine tensor [G, T, E, C]: the dispatch tensor times the gates."""
        return self.dispatch_tensor() * self.gate.unsqueeze(1)

    def usage(self) -> Usage:
        """The counts behind `metrics`, without a dense tensor [G, T, E, C]."""
        load = (self.token >= 0).sum(-1)
        requests = None
        if self.expert is not None and self.slot is not None:
            requests = (self.expert >= 0).sum(), (self.slot >= 0).sum()
        dropped = self.offsets.diff(dim=1) == 0
        return Usage(load.to(self.gate.dtype), load, self.weights, dropped, requests)

    def __repr__(self) -> str:
        """Shape and kind, without the tensors' values."""
        return _describe(self)

    # A routing is compared as an object: `==` of tuples would ask for the truth of a tensor.
    __eq__ = object.__eq__  # type: ignore[assignment]
    __hash__ = object.__hash__


class _Soft(NamedTuple):
    logits: Tensor
    num_experts: int
    mask: Tensor | None = None


class SoftRouting(_Soft, Routing):
    """Dense dispatch and combine tensors: two softmaxes of the same logits.

    Attributes:
        logits: [G, T, E * C], expert by expert, -inf in the rows of masked tokens.
    """

    __slots__ = ()

    @property
    def num_groups(self) -> int:
        """G."""
        return self.logits.shape[0]

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.logits.shape[1]

    @property
    def capacity(self) -> int:
        """C."""
        return self.logits.shape[2] // self.num_experts

    @property
    def device(self) -> torch.device:
        """The device of the logits."""
        return self.logits.device

    def dispatch(self, x: Tensor) -> Tensor:
        """Tokens x [G, T, D] to slots [E, G, C, D], every slot a mean of the tokens."""
        _check_rows(self, "dispatch", "x", x, "G T D", self.logits)
        # Masked tokens have weight 0, and 0 times NaN is NaN.
        x = fill_masked(x, self.mask, 0.0)
        return soft_mix_unchecked(self.logits, x, 1, self.num_experts)

    def combine(self, y: Tensor) -> Tensor:
        """Slots y [E, G, C, D] to tokens [G, T, D], every token a mean of the slots."""
        _check_rows(self, "combine", "y", y, "E G C D", self.logits)
        return soft_mix_unchecked(self.logits, y, 2, self.num_experts)

    def dispatch_tensor(self) -> Tensor:
        """The dense dispatch tensor [G, T, E, C]: softmax over the tokens."""
        return self._softmax(1)

    def combine_tensor(self) -> Tensor:
        """The dense combine tensor [G, T, E, C]: softmax over all slots."""
        return self._softmax(2)

    def _softmax(self, dim: int) -> Tensor:
        dense = fill_masked(self.logits.softmax(dim), self.mask, 0.0)
        return dense.unflatten(2, (self.num_experts, self.capacity))

    def usage(self) -> Usage:
        """The counts behind `metrics`; the load is how much the tokens draw from an expert."""
        gates = self.combine_tensor().sum(-1)
        filled = gates.new_full((self.num_groups, self.num_experts), self.capacity)
        return Usage(gates.sum(1), filled, gates, gates.new_zeros(gates.shape[:2], dtype=torch.bool))

    def __repr__(self) -> str:
        """Shape and kind, without the tensors' values."""
        return _describe(self)

    __eq__ = object.__eq__  # type: ignore[assignment]
    __hash__ = object.__hash__


def _describe(routing: Routing) -> str:
    return (
        f"{type(routing).__name__}(num_groups={routing.num_groups}, num_tokens={routing.num_tokens}, "
        f"num_experts={routing.num_experts}, capacity={routing.capacity})"
    )
