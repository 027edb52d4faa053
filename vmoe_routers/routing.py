"""Routings: the two tensors of the formulation, dispatch and combine, and what they do.

Per group, tokens X [T, D], dispatch tensor D and combine tensor B, both [T, E, C]
(section 3 of arXiv 2401.15969):

    expert inputs    X~[e, c] = sum_t D[t, e, c] X[t]
    layer output     Y[t]     = sum_{e, c} B[t, e, c] Y~[e, c]

A routing holds them in the form its router makes them, never as the dense tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers import ops
from vmoe_routers.gates import Gates, as_gates
from vmoe_routers.ops._checks import (
    check_choice,
    check_device,
    check_flag,
    check_floating,
    check_int,
    check_mask,
    check_positive,
    check_shape,
    check_tensor,
    fill_absent,
)


def capacity(
    tokens: int,
    num_experts: int,
    factor: float,
    rounding: str = "ceil",
    multiple_of: int = 4,
) -> int:
    """Slots per expert and group: ``tokens * factor / num_experts``, rounded.

    Args:
        tokens: tokens of a group; for Token Choice times the experts per token.
        num_experts: E.
        factor: the capacity factor, > 0.
        rounding: "ceil" or "round" (half to even).
        multiple_of: then up to a multiple of this; 0 and 1 mean off.

    Returns:
        At least 1, before the multiple is taken.

    Raises:
        TypeError, ValueError: a number or choice out of range.
    """
    tokens = check_int("capacity", "tokens", tokens, 0)
    num_experts = check_int("capacity", "num_experts", num_experts, 1)
    factor = check_positive("capacity", "factor", factor)
    check_choice("capacity", "rounding", rounding, ("ceil", "round"))
    multiple_of = check_int("capacity", "multiple_of", multiple_of, 0)
    slots = tokens * factor / num_experts
    slots = max(1, math.ceil(slots) if rounding == "ceil" else round(slots))
    return slots if multiple_of < 2 else -(-slots // multiple_of) * multiple_of


class Routing(ABC):
    """What a router returns.

    Attributes:
        num_groups, num_tokens, num_experts, capacity: G, T, E and C.
        mask: [G, T] bool, True = real token, or None.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        mask: Tensor | None,
        losses: Mapping[str, Callable[[], Tensor]],
        loss_weights: Mapping[str, float],
    ):
        self.num_groups, self.num_tokens, self.num_experts, self.capacity = shape
        self.mask = mask
        self._losses = losses
        self._loss_weights = loss_weights
        self._loss_values: dict[str, Tensor] | None = None

    @abstractmethod
    def dispatch(self, x: Tensor) -> Tensor:
        """Expert inputs: tokens x [G, T, D] to [G, E, C, D], in x's dtype."""

    @abstractmethod
    def combine(self, y: Tensor) -> Tensor:
        """Layer output: the experts' y [G, E, C, D] to [G, T, D], in y's dtype."""

    @abstractmethod
    def dispatch_tensor(self) -> Tensor:
        """The dense dispatch tensor D, [G, T, E, C]."""

    @abstractmethod
    def combine_tensor(self) -> Tensor:
        """The dense combine tensor B, [G, T, E, C]."""

    @property
    def filled(self) -> Tensor | None:
        """[G, E] int32: behind so many slots of an expert's buffer there is no token. None: all are filled."""
        return None

    # Not a cached_property: torch.compile does not take its lock (Python < 3.12).
    @property
    def losses(self) -> dict[str, Tensor]:
        """The auxiliary losses, unweighted scalars by name; see `vmoe_routers.losses`."""
        if self._loss_values is None:
            self._loss_values = {name: loss() for name, loss in self._losses.items()}
        return self._loss_values

    @property
    def aux_loss(self) -> Tensor:
        """The weighted sum of the losses, a scalar; only those with a weight are computed."""
        total = self._zero()
        for name, weight in self._loss_weights.items():
            if weight != 0:
                loss = self._losses[name]() if self._loss_values is None else self._loss_values[name]
                total = total + weight * loss
        return total

    @property
    def metrics(self) -> dict[str, Tensor]:
        """How the router used its experts, computed on reading; tensors without gradient.

        load [G, E]: tokens in every expert's buffer (Soft MoE: what the tokens draw from it).
        utilisation: filled slots / slots.
        load_cv: coefficient of variation over experts of the load of all groups.
        entropy: mean over the tokens, of their gates over the experts, in nats.
        dropped: share of the tokens that no expert took.
        dead_experts: experts with no load at all.
        dropped_requests (Token Choice): share of the requests that found no place.
        """
        with torch.no_grad():
            return self._metrics()

    def _metrics(self) -> dict[str, Tensor]:
        load = self._load()
        total = load.sum(0)
        mean = total.mean().clamp(min=torch.finfo(total.dtype).tiny)
        gates = self._gates()
        share = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
        return {
            "load": load,
            "utilisation": self._utilisation(load),
            "load_cv": total.std(correction=0) / mean,
            "entropy": self._mean_over_tokens(-torch.xlogy(share, share).sum(-1)),
            "dropped": self._mean_over_tokens(self._untouched()),
            "dead_experts": (total == 0).sum(),
        }

    @abstractmethod
    def _zero(self) -> Tensor: ...

    @abstractmethod
    def _load(self) -> Tensor: ...

    @abstractmethod
    def _gates(self) -> Tensor: ...

    @abstractmethod
    def _utilisation(self, load: Tensor) -> Tensor: ...

    @abstractmethod
    def _untouched(self) -> Tensor: ...

    def _check(self, method: str, name: str, value: Tensor, axes: str, beside: Tensor) -> Tensor:
        where = f"{type(self).__name__}.{method}"
        value = check_floating(where, name, check_tensor(where, name, value, axes))
        sizes = {"G": self.num_groups, "T": self.num_tokens, "E": self.num_experts, "C": self.capacity}
        shape = [sizes.get(axis, value.shape[-1]) for axis in axes.split()]
        check_shape(where, name, value, shape, axes.replace(" ", ", "))
        check_device(where, name, value, "the routing", beside)
        return value

    def _mean_over_tokens(self, values: Tensor) -> Tensor:
        """Mean of values [G, T] over the real tokens."""
        if self.mask is None:
            return values.sum() / max(values.numel(), 1)
        return values.masked_fill(~self.mask, 0).sum() / self.mask.sum().clamp(min=1)


class SparseRouting(Routing):
    """A 0/1 dispatch tensor, held as the token and the gate of every slot.

    Attributes:
        token: [G, E, C] int32, the token in every slot, or -1: empty.
        gate: [G, E, C], its weight in the combine tensor, 0 where empty.
        weights: [G, T, E], what the gates were taken from; made on reading where the
            router did without.
        slot: [G, T, K] int32, the slot of every request (Token Choice), or None.
    """

    def __init__(
        self,
        token: Tensor,
        gate: Tensor,
        weights: Tensor | Gates,
        *,
        expert: Tensor | None = None,
        slot: Tensor | None = None,
        mask: Tensor | None = None,
        losses: Mapping[str, Callable[[], Tensor]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
    ):
        groups, experts, slots = token.shape
        self._weights = as_gates(weights)
        shape = (groups, self._weights.source.shape[1], experts, slots)
        super().__init__(shape, mask, losses or {}, loss_weights or {})
        self.token = token
        self.gate = gate
        self.expert = expert
        self.slot = slot
        self._offsets, self._slots, self._filled = ops.invert_slots(token, self.num_tokens)

    @property
    def weights(self) -> Tensor:
        """See `SparseRouting`."""
        return self._weights.dense()

    @property
    def filled(self) -> Tensor:
        """See `Routing.filled`."""
        return self._filled

    def dispatch(self, x: Tensor) -> Tensor:
        """See `Routing.dispatch`. A view: the experts come first in memory."""
        x = self._check("dispatch", "x", x, "G T D", self.gate)
        return ops.dispatch(x, self.token, self._offsets, self._slots).transpose(0, 1)

    def combine(self, y: Tensor) -> Tensor:
        """See `Routing.combine`. A token that no expert took gets zeros."""
        y = self._check("combine", "y", y, "G E C D", self.gate)
        return ops.combine(y.transpose(0, 1), self.gate, self.token, self._offsets, self._slots)

    def dispatch_tensor(self) -> Tensor:
        """See `Routing.dispatch_tensor`; zeros and ones."""
        groups, experts, slots = self.token.shape
        # Empty slots are written to a row behind the last token, which is cut off.
        dense = self.gate.new_zeros(groups, self.num_tokens + 1, experts, slots)
        row = torch.where(self.token < 0, self.num_tokens, self.token).long()
        return dense.scatter(1, row.unsqueeze(1), 1)[:, : self.num_tokens]

    def combine_tensor(self) -> Tensor:
        """See `Routing.combine_tensor`: the dispatch tensor times the gates."""
        return self.dispatch_tensor() * self.gate.unsqueeze(1)

    def _metrics(self) -> dict[str, Tensor]:
        metrics = super()._metrics()
        if self.slot is not None and self.expert is not None:
            requests = (self.expert >= 0).sum()
            dropped = requests - (self.slot >= 0).sum()
            metrics["dropped_requests"] = dropped / requests.clamp(min=1)
        return metrics

    def _zero(self) -> Tensor:
        return self.gate.new_zeros(())

    def _load(self) -> Tensor:
        return (self.token >= 0).sum(-1).to(self.gate.dtype)

    def _gates(self) -> Tensor:
        return self.weights

    def _utilisation(self, load: Tensor) -> Tensor:
        return load.sum() / max(self.token.numel(), 1)

    def _untouched(self) -> Tensor:
        return (self._offsets.diff(dim=1) == 0).to(self.gate.dtype)


class SoftRouting(Routing):
    """Dense dispatch and combine tensors: two softmaxes of the same logits.

    Attributes:
        logits: [G, T, E * C], -inf for the tokens that a mask leaves out.
    """

    def __init__(self, logits: Tensor, num_experts: int, mask: Tensor | None = None):
        groups, tokens, slots = logits.shape
        super().__init__((groups, tokens, num_experts, slots // num_experts), mask, {}, {})
        self.logits = fill_absent(logits, mask)

    def dispatch(self, x: Tensor) -> Tensor:
        """See `Routing.dispatch`: every slot a mean of the tokens. A view: the experts come first in memory."""
        x = self._check("dispatch", "x", x, "G T D", self.logits)
        # Their weights are 0, and 0 times NaN is NaN.
        x = fill_absent(x, self.mask, 0.0)
        return ops.soft_mix(self._by_expert(self.logits), x, dim=1)

    def combine(self, y: Tensor) -> Tensor:
        """See `Routing.combine`: every token a mean of the slots."""
        y = self._check("combine", "y", y, "G E C D", self.logits)
        return ops.soft_mix(self._by_expert(self.logits), y, dim=2)

    def dispatch_tensor(self) -> Tensor:
        """See `Routing.dispatch_tensor`: softmax over the tokens."""
        return self._softmax(1)

    def combine_tensor(self) -> Tensor:
        """See `Routing.combine_tensor`: softmax over all slots."""
        return self._softmax(2)

    def _softmax(self, dim: int) -> Tensor:
        return self._by_expert(fill_absent(self.logits.softmax(dim), self.mask, 0.0))

    def _by_expert(self, dense: Tensor) -> Tensor:
        return dense.unflatten(2, (self.num_experts, self.capacity))

    def _zero(self) -> Tensor:
        return self.logits.new_zeros(())

    def _load(self) -> Tensor:
        return self._gates().sum(1)

    def _gates(self) -> Tensor:
        return self.combine_tensor().sum(-1)

    def _utilisation(self, load: Tensor) -> Tensor:
        return load.new_ones(())

    def _untouched(self) -> Tensor:
        return self.logits.new_zeros(self.logits.shape[:2])


def token_choice(
    gates: Tensor | Gates,
    top_k: int,
    capacity: int,
    *,
    batch_priority: bool = False,
    weights: Tensor | Gates | None = None,
    renormalize: bool = False,
    mask: Tensor | None = None,
    losses: Mapping[str, Callable[[], Tensor]] | None = None,
    loss_weights: Mapping[str, float] | None = None,
) -> SparseRouting:
    """Every token asks its `top_k` experts for a place (V-MoE, arXiv 2106.05974).

    Args:
        gates: [G, T, E] floating point, or a `Gates`; select. Ties go to the lower index; a gate
            of -inf is never asked for.
        top_k: experts per token, 1 <= K <= E.
        capacity: C, slots per expert and group.
        batch_priority: fill the buffers in descending order of the tokens' largest
            gate instead of in index order.
        weights: [G, T, E], go into the combine tensor; `gates` where left out.
        renormalize: divide a token's kept weights by the sum of its top_k.
        mask: [G, T] bool, True = real token; others ask for nothing.
        losses, loss_weights: see `Routing`.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or number.
    """
    gates, weights = _check_gates("token_choice", gates, weights, mask)
    num_experts = gates.source.shape[2]
    top_k = check_int("token_choice", "top_k", top_k, 1, num_experts)
    capacity = check_int("token_choice", "capacity", capacity, 1)
    check_flag("token_choice", "batch_priority", batch_priority)
    check_flag("token_choice", "renormalize", renormalize)
    best, kept, expert = _choose(gates, weights, top_k, 2, mask)
    slot, source = ops.assign_slots(expert, num_experts, capacity, best[..., 0] if batch_priority else None)
    if renormalize:
        total = kept.sum(-1, keepdim=True)
        kept = kept / total.clamp(min=torch.finfo(total.dtype).tiny)
    return SparseRouting(
        source.div(top_k, rounding_mode="floor"),
        _take(kept.flatten(1), source),
        weights,
        expert=expert,
        slot=slot,
        mask=mask,
        losses=losses,
        loss_weights=loss_weights,
    )


def expert_choice(
    gates: Tensor | Gates,
    capacity: int,
    *,
    weights: Tensor | Gates | None = None,
    renormalize: bool = False,
    mask: Tensor | None = None,
    losses: Mapping[str, Callable[[], Tensor]] | None = None,
    loss_weights: Mapping[str, float] | None = None,
) -> SparseRouting:
    """Every expert takes the tokens of its `capacity` largest gates (arXiv 2202.09368).

    Args:
        gates: [G, T, E] floating point, or a `Gates`; select. Ties go to the lower index; a gate
            of -inf is never taken, the slot stays empty.
        capacity: C, slots per expert and group; more than T is clamped to T.
        weights: [G, T, E], go into the combine tensor; `gates` where left out.
        renormalize: divide a token's weights by their sum over the experts that took it.
        mask: [G, T] bool, True = real token; others are never taken.
        losses, loss_weights: see `Routing`.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or number.
    """
    gates, weights = _check_gates("expert_choice", gates, weights, mask)
    capacity = check_int("expert_choice", "capacity", capacity, 1)
    check_flag("expert_choice", "renormalize", renormalize)
    tokens = gates.source.shape[1]
    _, kept, token = _choose(gates, weights, min(capacity, tokens), 1, mask)
    if renormalize:
        kept = _share(kept, token, tokens)
    return SparseRouting(
        token,
        kept,
        weights,
        mask=mask,
        losses=losses,
        loss_weights=loss_weights,
    )


def _check_gates(
    where: str, gates: Tensor | Gates, weights: Tensor | Gates | None, mask: Tensor | None
) -> tuple[Gates, Gates]:
    """gates and weights, which are the gates where left out."""
    choosing = as_gates(gates)
    source = check_floating(where, "gates", check_tensor(where, "gates", choosing.source, "G T E"))
    if source.shape[2] == 0:
        raise ValueError(f"{where}: gates must have at least one expert, got {list(source.shape)}")
    if mask is not None:
        check_mask(where, mask, "gates", source)
    if weights is None or weights is gates:
        return choosing, choosing
    weighing = as_gates(weights)
    check_floating(where, "weights", weighing.source)
    check_shape(where, "weights", weighing.source, source.shape, "G, T, E")
    check_device(where, "weights", weighing.source, "gates", source)
    return choosing, weighing


def _choose(gates: Gates, weights: Gates, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of the k chosen: what they were chosen by, without gradient, what they weigh, and the indices."""
    if weights is gates:
        kept, indices = gates.choose(k, dim, mask)
        return kept.detach(), kept, indices
    with torch.no_grad():
        best, indices = gates.choose(k, dim, mask)
    return best, weights.at(indices, dim), indices


def _share(kept: Tensor, token: Tensor, tokens: int) -> Tensor:
    """kept [G, E, C] over the sum of what is kept of the same token; 0 in empty slots."""
    groups, experts, slots = kept.shape
    ones = kept.new_ones(experts, groups, slots, 1)
    lists = ops.invert_slots(token, tokens)[:2]
    # A dispatch of the sums, whose gradient is a combine again: added up in one order on every device.
    total = ops.dispatch(ops.combine(ones, kept, token, *lists), token, *lists)
    return kept / total.squeeze(3).transpose(0, 1).clamp(min=torch.finfo(kept.dtype).tiny)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [G, N] at index [G, E, C], 0 where the index is negative."""
    # A zero behind the last value is there to be taken, also from a group without values.
    padded = F.pad(values, (0, 1))
    where = torch.where(index < 0, values.shape[1], index)
    return padded.gather(1, where.flatten(1).long()).view(index.shape)
