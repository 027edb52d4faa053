"""LayerTrace: statistics of the recorded routings of one MoE layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.inspect.sums import metrics_of, sums_of
from vmoe_routers.ops._checks import Check
from vmoe_routers.routers import Routing, SoftRouting, SparseRouting
from vmoe_routers.routers.affinity import Sinkhorn, Softmax, SparsityConstrained

_AFFINITIES = {Softmax: "Softmax", Sinkhorn: "Sinkhorn", SparsityConstrained: "Sparsity-constrained"}
_CHOICES = {"TokenChoiceRouter": "Token Choice", "ExpertChoiceRouter": "Expert Choice", "SoftRouter": "Soft MoE"}


class LayerTrace:
    """Recorded routings of one MoE layer.

    Statistics are over all routings. They have no gradient and leave out padding.

    Attributes:
        name: Name of the layer in the model.
        router: The layer's router.
        routings: The routings.
        previous: The MoE layer before this one, or None.
    """

    def __init__(
        self,
        name: str,
        router: nn.Module,
        routings: Sequence[Routing],
        tokens: Sequence[int],
        previous: LayerTrace | None = None,
    ):
        self.name: str = name
        self.router: nn.Module = router
        self.previous: LayerTrace | None = previous
        self.routings: tuple[Routing, ...] = tuple(routings)
        self._tokens = tuple(tokens)

    def __repr__(self) -> str:
        sizes = f"{self.num_images} images, {self.num_experts} experts"
        balance = f"load CV {self.load_cv:.2f}, dropped {self.dropped:.2f}"
        return f"<LayerTrace {self.name!r}: {self.title}, {sizes}, {balance}>"

    @property
    def title(self) -> str:
        """Name of the router for people: "Sinkhorn Token Choice". An own router has the name of its class."""
        kind = type(self.router).__name__
        choice, affinity = _CHOICES.get(kind, kind), getattr(self.router, "affinity", None)
        if affinity is None:
            return choice
        return f"{_AFFINITIES.get(type(affinity), getattr(affinity, '__name__', type(affinity).__name__))} {choice}"

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.routings[0].num_experts

    @property
    def num_images(self) -> int:
        """Number of recorded images."""
        return sum(r.num_groups * (r.num_tokens // max(n, 1)) for r, n in self._pairs)

    @property
    def _pairs(self) -> list[tuple[Routing, int]]:
        return list(zip(self.routings, self._tokens, strict=True))

    @cached_property
    @torch.no_grad()
    def _metrics(self) -> dict[str, Any]:
        def sums(routing: Routing) -> Tensor:
            shape = routing.num_groups, routing.num_tokens
            return sums_of(routing, torch.ones(shape, dtype=torch.float64, device=routing.device))

        return metrics_of(sum((sums(r) for r in self.routings[1:]), sums(self.routings[0])), max(self.num_images, 1))

    @property
    def load(self) -> Tensor:
        """[E] float64, tokens per image in the buffers of every expert. For Soft MoE, sums of the tokens' weights."""
        return torch.tensor(self._metrics["load"], dtype=torch.float64)

    @property
    def utilisation(self) -> float:
        """Filled slots over all slots."""
        return self._metrics["utilisation"]

    @property
    def load_cv(self) -> float:
        """Coefficient of variation of the load over the experts. 0: every expert gets the same load."""
        return self._metrics["load_cv"]

    @property
    def entropy(self) -> float:
        """Entropy of a token's gates over the experts in nats, mean over the tokens, at most log E."""
        return self._metrics["entropy"]

    @property
    def dropped(self) -> float:
        """Share of the tokens that no expert took."""
        return self._metrics["dropped"]

    @property
    def dropped_requests(self) -> float | None:
        """Share of the requests that got no slot, or None if tokens make no requests."""
        return self._metrics.get("dropped_requests")

    @property
    def dead_experts(self) -> int:
        """Number of experts without load."""
        return self._metrics["dead_experts"]

    def weights(self) -> list[tuple[Tensor, Tensor]]:
        """Computes for every routing which expert takes which token, and the expert's weight in the token's output.

        Returns:
            Pairs of tensors [images, T, E], T the tokens of an image: the dispatch tensor and the combine tensor,
                summed over the slots. For Soft MoE the combine tensor twice.
        """
        return [_by_image(weights_of(routing), tokens) for routing, tokens in self._pairs]

    @torch.no_grad()
    def experts(self) -> Tensor:
        """Finds the expert with the largest weight in the output of every token.

        Returns:
            [N] int64 over the tokens of all images in order, -1 for a token that no expert took, -2 for padding.
        """
        found = []
        for (taken, weight), (routing, _) in zip(self.weights(), self._pairs, strict=True):
            expert = torch.where(taken > 0, weight, -1.0).argmax(-1)
            expert = expert.masked_fill(taken.sum(-1) == 0, -1).flatten()
            found.append(expert if routing.mask is None else expert.masked_fill(~routing.mask.flatten(), -2))
        return torch.cat(found)

    @cached_property
    def _experts(self) -> Tensor:
        return self.experts()

    @cached_property
    def agreement(self) -> float | None:
        """Normalised mutual information of a token's expert in this layer and in the previous layer.

        Only the tokens that both layers took are counted.

        0: the expert in one layer says nothing about the expert in the other layer. 1: each determines the other. None
        for the first layer, and if the layers have different tokens.
        """
        if self.previous is None:
            return None
        mine, before = self._experts, self.previous._experts.to(self._experts.device)
        if mine.shape != before.shape:
            return None
        both = (mine >= 0) & (before >= 0)
        table = torch.zeros(self.previous.num_experts, self.num_experts, dtype=torch.float64, device=mine.device)
        table.index_put_((before[both], mine[both]), table.new_ones(()), accumulate=True)
        return normalised_mutual_information(table)

    @cached_property
    @torch.no_grad()
    def slot_similarity(self) -> float | None:
        """Mean cosine similarity of the weights of two slots. 1: all slots are equal. None for sparse routers."""
        values = []
        for routing in self.routings:
            if not isinstance(routing, SoftRouting) or routing.logits.shape[2] < 2:
                return None
            units = nn.functional.normalize(routing.dispatch_tensor().flatten(2).double(), dim=1)  # [G, T, S]
            slots = units.shape[2]
            values.append((units.sum(2).square().sum(1) - units.square().sum((1, 2))) / (slots * (slots - 1)))
        return _mean(values)

    @property
    def is_transport(self) -> bool:
        """Whether the gates that select are a transport plan."""
        return isinstance(getattr(self.router, "affinity", None), (Sinkhorn, SparsityConstrained))

    @cached_property
    @torch.no_grad()
    def _errors(self) -> tuple[float, float] | None:
        """Errors of the marginals over tokens and over experts."""
        if not self.is_transport:
            return None
        tokens, experts = [], []
        for routing in self.routings:
            plan, mask = selecting(routing).double(), routing.mask
            real = torch.ones_like(plan[..., 0]) if mask is None else mask.double()
            target = real.sum(1, keepdim=True).clamp(min=1) / routing.num_experts
            tokens.append((plan.sum(2) - real).abs().amax(1))
            experts.append((plan.sum(1) / target - 1).abs().amax(1))
        return _mean(tokens), _mean(experts)

    @property
    def token_error(self) -> float | None:
        """Error of a transport plan's sum per token, ``max_t |sum_e plan - 1|``, or None without plan.

        The error is a mean over the groups.
        """
        return None if self._errors is None else self._errors[0]

    @property
    def expert_error(self) -> float | None:
        """Error of a transport plan's sum per expert, ``max_e |sum_t plan - n/E| / (n/E)``, or None without plan.

        The error is a mean over the groups.
        """
        return None if self._errors is None else self._errors[1]

    def by_class(self, labels: Tensor | Sequence[int], num_classes: int | None = None) -> Tensor:
        """Computes how the tokens of the images of every class are shared among the experts.

        Args:
            labels: The class of every recorded image, [images] int.
            num_classes: Number of classes, by default the largest label plus one.

        Returns:
            [classes, E] float64. A row sums to 1. The row of a class without a token in a buffer is 0.
        """
        check = Check("LayerTrace.by_class")
        labels = torch.as_tensor(labels)
        if labels.shape != (self.num_images,) or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"{check.where}: labels must be {self.num_images} whole numbers, one per recorded image, got "
                f"{labels.dtype} {list(labels.shape)}"
            )
        labels = labels.long().cpu()
        least = int(labels.max()) + 1 if len(labels) else 1
        classes = least if num_classes is None else check.integer("num_classes", num_classes, 1)
        if int(labels.min() if len(labels) else 0) < 0 or least > classes:
            raise ValueError(f"{check.where}: labels must be in [0, {classes - 1}], got {labels.unique().tolist()}")
        load = torch.cat([taken.sum(1, dtype=torch.float64).cpu() for taken, _ in self.weights()])  # [images, E]
        table = torch.zeros(classes, self.num_experts, dtype=torch.float64).index_add_(0, labels, load)
        return table / table.sum(1, keepdim=True).clamp(min=1e-12)

    def image(self, index: int) -> tuple[Routing, int, slice]:
        """Finds a recorded image: its routing, its group, and the positions of its tokens in the group."""
        rest = index if index >= 0 else self.num_images + index
        for routing, tokens in self._pairs:
            per_group = routing.num_tokens // max(tokens, 1)
            if 0 <= rest < routing.num_groups * per_group:
                first = rest % per_group * tokens
                return routing, rest // per_group, slice(first, first + tokens)
            rest -= routing.num_groups * per_group
        raise ValueError(f"index must be in [0, {self.num_images - 1}], the recorded images, got {index}")


def selecting(routing: Routing) -> Tensor:
    """Computes the gates that selected, [G, T, E].

    Raises:
        ValueError: The routing has no gates.
    """
    if not isinstance(routing, SparseRouting):
        raise ValueError(f"a routing with gates is wanted, got {type(routing).__name__}")
    gates = routing.gates if routing.selecting is None else routing.selecting
    return gates.dense().detach()


@torch.no_grad()
def weights_of(routing: Routing) -> tuple[Tensor, Tensor]:
    """Sums dispatch and combine tensor of a routing over the slots, [G, T, E]."""
    if isinstance(routing, SoftRouting):
        weight = routing.combine_tensor().sum(-1)
        return weight, weight
    if not isinstance(routing, SparseRouting):
        return routing.dispatch_tensor().sum(-1), routing.combine_tensor().sum(-1)
    # Do not make the dense tensors. Empty slots are written to an extra row after the last token. The row is cut off.
    token = torch.where(routing.token < 0, routing.num_tokens, routing.token).long().transpose(1, 2)  # [G, C, E]
    zeros = routing.gate.new_zeros(routing.num_groups, routing.num_tokens + 1, routing.num_experts)
    gate = routing.gate.transpose(1, 2)
    taken, weight = zeros.scatter_add(1, token, torch.ones_like(gate)), zeros.scatter_add(1, token, gate)
    return taken[:, :-1], weight[:, :-1]


def _by_image(pair: tuple[Tensor, Tensor], tokens: int) -> tuple[Tensor, Tensor]:
    taken, weight = (values.reshape(-1, tokens, values.shape[-1]) for values in pair)
    return taken, weight


def _mean(values: list[Tensor]) -> float:
    return float(torch.cat(values).mean())


def normalised_mutual_information(table: Tensor) -> float:
    """Computes the mutual information of two partitions, over the mean of their entropies.

    Args:
        table: [A, B] float64, number of items in part a of the first partition and part b of the second.

    Returns:
        A number in [0, 1], 1 if both partitions have one part, 0 without items.
    """
    total = table.sum()
    if total == 0:
        return 0.0
    joint = table / total
    rows, columns = joint.sum(1), joint.sum(0)
    entropies = (-torch.xlogy(p, p).sum() for p in (rows, columns, joint))
    first, second, both = map(float, entropies)
    if first + second == 0:
        return 1.0
    return min(max(2 * (first + second - both) / (first + second), 0.0), 1.0)
