"""Routings: the dispatch and combine tensors of the formulation, and their products with tokens and slots.

For every group, with tokens X [T, width], a dispatch tensor D and a combine tensor B, both [T, E, C] (section 3 of
arXiv 2401.15969):

    expert inputs    X~[e, c] = sum_t D[t, e, c] X[t]
    layer output     Y[t]     = sum_{e, c} B[t, e, c] Y~[e, c]

A routing holds D and B in the compact form of its router, not as dense tensors. Slots always have the layout
[E, G, C, D]: the rows of one expert form one matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import cast, compute_dtype, fill_masked
from vmoe_routers.ops.combine import combine_unchecked
from vmoe_routers.ops.dispatch import dispatch_unchecked
from vmoe_routers.ops.soft_mix import soft_mix_unchecked
from vmoe_routers.routers.gates import Gates
from vmoe_routers.routers.metrics import Usage, metrics

Losses = Mapping[str, Callable[[], Tensor]]
"""Auxiliary losses by name: functions that return an unweighted scalar."""


class Routing(ABC):
    """Result of a router.

    A subclass provides the attributes and four abstract methods. All other members use only these.

    Attributes:
        num_groups, num_tokens, num_experts, capacity: G, T, E and C.
        device: Device of the routing's tensors.
        mask: [G, T] bool, True = real token, or None.
        filled: [G, E] int32, the number of leading slots that may hold a token. None means all slots.
        loss_terms: Auxiliary losses, functions by name. By default there are none.
        loss_weights: Weights of the losses in `aux_loss`.
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
        """Maps tokens x [G, T, D] to the experts' inputs, slots [E, G, C, D], in x's dtype."""

    @abstractmethod
    def combine(self, y: Tensor) -> Tensor:
        """Maps the experts' outputs, slots y [E, G, C, D], to tokens [G, T, D], in y's dtype."""

    @abstractmethod
    def dispatch_tensor(self) -> Tensor:
        """Makes the dense dispatch tensor D, [G, T, E, C]."""

    @abstractmethod
    def combine_tensor(self) -> Tensor:
        """Makes the dense combine tensor B, [G, T, E, C]."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """Auxiliary losses, unweighted scalars by name (`vmoe_routers.losses`), computed at every access."""
        return {name: loss() for name, loss in self.loss_terms.items()}

    @property
    def aux_loss(self) -> Tensor:
        """Weighted sum of the losses, a scalar. Losses without a weight are not computed."""
        weighted = [weight * self._loss(name) for name, weight in self.loss_weights.items() if weight != 0]
        return sum(weighted[1:], weighted[0]) if weighted else torch.zeros((), device=self.device)

    def _loss(self, name: str) -> Tensor:
        check = Check(type(self).__name__)
        if name not in self.loss_terms:
            raise ValueError(f"{check.where}: loss_weights has {name!r}, but loss_terms has no such loss")
        value = check.tensor(f"the loss {name!r}", self.loss_terms[name]())
        if value.ndim:
            raise ValueError(f"{check.where}: the loss {name!r} must be a scalar, got shape {list(value.shape)}")
        return value

    @property
    def metrics(self) -> dict[str, Tensor]:
        """Metrics by name: load, utilisation, entropy, dropped tokens, ... (`vmoe_routers.routers.metrics.metrics`)."""
        return metrics(self)

    def usage(self) -> Usage:
        """Counts for `metrics`, from the two dense tensors."""
        D, B = _wide(self.dispatch_tensor()), _wide(self.combine_tensor())
        taken = D.sum((2, 3))
        return Usage(D.sum((1, 3)), (D != 0).any(1).sum(-1), B.sum(-1), taken == 0)


def _wide(x: Tensor) -> Tensor:
    """Converts 16-bit values to float32, because 16 bits do not hold every count."""
    return cast(x, compute_dtype(x.dtype))


def _check_rows(routing: Routing, method: str, name: str, value: Tensor, axes: str, beside: Tensor) -> None:
    check = Check(f"{type(routing).__name__}.{method}")
    check.floating(name, value, axes)
    G, T, E, C = routing.num_groups, routing.num_tokens, routing.num_experts, routing.capacity
    shape = (G, T) if axes == "G T D" else (E, G, C)
    if value.shape[:-1] != shape:
        check.shape(name, value, (*shape, value.shape[-1]), axes.replace(" ", ", "))
    check.device(name, value, "the routing", beside)


class _ByIdentity:
    """Base of routings that are named tuples, before the tuple: compares by identity, and prints no tensors.

    Comparing tuples would need the truth value of a tensor.
    """

    __slots__ = ()

    def __repr__(self: Any) -> str:
        """Describes class and shape, without the values of the tensors."""
        return (
            f"{type(self).__name__}(num_groups={self.num_groups}, num_tokens={self.num_tokens}, "
            f"num_experts={self.num_experts}, capacity={self.capacity})"
        )

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)


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
    selecting: Gates | None = None


# A named tuple, so that code that walks over a module's outputs (hooks, pytrees, summaries) finds the tensors.
class SparseRouting(_ByIdentity, _Sparse, Routing):
    """Routing with a 0/1 dispatch tensor, held as the token and the weight of every slot.

    Attributes:
        token: [G, E, C] int32, the token in every slot, or -1 in an empty slot.
        gate: [G, E, C], the weight of every slot in the combine tensor, or 0 in an empty slot.
        gates: The `Gates` from which `gate` was gathered.
        offsets, slots, filled: [G, T + 1], [G, E * C] and [G, E] int32, results of `ops.invert_slots` for `token`: the
            slots of every token, and the position after the last filled slot of every buffer.
        expert: [G, T, K] int32, the expert of every request. None for Expert Choice.
        slot: [G, T, K] int32, the slot of every request, -1 if dropped. None for Expert Choice.
        selecting: The `Gates` that selected, such as a transport plan, or None if `gates` selected.
    """

    __slots__ = ()

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return self.token.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a group, T."""
        return self.gates.source.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.token.shape[1]

    @property
    def capacity(self) -> int:
        """Slots per expert, C."""
        return self.token.shape[2]

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.token.device

    @property
    def weights(self) -> Tensor:
        """All gates that weigh, [G, T, E], computed at every access."""
        return self.gates.dense()

    def dispatch(self, x: Tensor) -> Tensor:
        """Maps tokens x [G, T, D] to slots [E, G, C, D]. An empty slot gets zeros."""
        _check_rows(self, "dispatch", "x", x, "G T D", self.gate)
        return dispatch_unchecked(x, self.token, self.offsets, self.slots)

    def combine(self, y: Tensor) -> Tensor:
        """Maps slots y [E, G, C, D] to tokens [G, T, D]. A token that no expert took gets zeros."""
        _check_rows(self, "combine", "y", y, "E G C D", self.gate)
        return combine_unchecked(y, self.gate, self.token, self.offsets, self.slots)

    def dispatch_tensor(self) -> Tensor:
        """Makes the dense dispatch tensor [G, T, E, C] of zeros and ones."""
        return self._dense(torch.ones_like(self.gate))

    def combine_tensor(self) -> Tensor:
        """Makes the dense combine tensor [G, T, E, C]: the weight of every slot in the row of its token, else 0."""
        return self._dense(self.gate)

    def _dense(self, values: Tensor) -> Tensor:
        """Writes a value per slot [G, E, C] to the row of the slot's token, [G, T, E, C]."""
        groups, experts, slots = self.token.shape
        # Empty slots are written to an extra row after the last token, which is cut off.
        dense = values.new_zeros(groups, self.num_tokens + 1, experts, slots)
        row = torch.where(self.token < 0, self.num_tokens, self.token).long()
        return dense.scatter(1, row.unsqueeze(1), values.unsqueeze(1))[:, : self.num_tokens]

    def usage(self) -> Usage:
        """Counts for `metrics`, without a dense tensor [G, T, E, C]."""
        load = (self.token >= 0).sum(-1)
        requests = None
        if self.expert is not None and self.slot is not None:
            requests = (self.expert >= 0).sum((1, 2)), (self.slot >= 0).sum((1, 2))
        dropped = self.offsets.diff(dim=1) == 0
        gates = _wide(self.weights)
        return Usage(load.to(gates.dtype), load, gates, dropped, requests)


class _Soft(NamedTuple):
    logits: Tensor
    num_experts: int
    mask: Tensor | None = None


class SoftRouting(_ByIdentity, _Soft, Routing):
    """Routing with dense dispatch and combine tensors, two softmaxes of the same logits.

    Attributes:
        logits: [G, T, E * C], ordered by expert. The rows of masked tokens are -inf.
    """

    __slots__ = ()

    @property
    def num_groups(self) -> int:
        """Number of groups, G."""
        return self.logits.shape[0]

    @property
    def num_tokens(self) -> int:
        """Number of tokens of a group, T."""
        return self.logits.shape[1]

    @property
    def capacity(self) -> int:
        """Slots per expert, C."""
        return self.logits.shape[2] // self.num_experts

    @property
    def device(self) -> torch.device:
        """Device of the logits."""
        return self.logits.device

    def dispatch(self, x: Tensor) -> Tensor:
        """Maps tokens x [G, T, D] to slots [E, G, C, D], every slot a weighted mean of the tokens."""
        _check_rows(self, "dispatch", "x", x, "G T D", self.logits)
        # Masked tokens have the weight 0, and 0 times NaN is NaN.
        x = fill_masked(x, self.mask, 0.0)
        return soft_mix_unchecked(self.logits, x, 1, self.num_experts)

    def combine(self, y: Tensor) -> Tensor:
        """Maps slots y [E, G, C, D] to tokens [G, T, D], every token a weighted mean of the slots."""
        _check_rows(self, "combine", "y", y, "E G C D", self.logits)
        return soft_mix_unchecked(self.logits, y, 2, self.num_experts)

    def dispatch_tensor(self) -> Tensor:
        """Makes the dense dispatch tensor [G, T, E, C]: the softmax over the tokens."""
        return self._softmax(1)

    def combine_tensor(self) -> Tensor:
        """Makes the dense combine tensor [G, T, E, C]: the softmax over all slots."""
        return self._softmax(2)

    def _softmax(self, dim: int) -> Tensor:
        dense = fill_masked(self.logits.softmax(dim), self.mask, 0.0)
        return dense.unflatten(2, (self.num_experts, self.capacity))

    def usage(self) -> Usage:
        """Counts for `metrics`. The load of an expert is the sum of its weights over the tokens."""
        gates = _wide(self.combine_tensor()).sum(-1)
        filled = gates.new_full((self.num_groups, self.num_experts), self.capacity)
        return Usage(gates.sum(1), filled, gates, gates.new_zeros(gates.shape[:2], dtype=torch.bool))
