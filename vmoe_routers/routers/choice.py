"""Choices, which fill the slots: tokens choose experts, or experts choose tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers.ops._checks import Check, exporting, larger, smaller, traced_size
from vmoe_routers.ops.assign_slots import assign_slots_unchecked
from vmoe_routers.ops.combine import combine_unchecked
from vmoe_routers.ops.dispatch import dispatch_unchecked
from vmoe_routers.ops.invert_slots import invert_slots_unchecked
from vmoe_routers.routers.gates import Gates, as_gates
from vmoe_routers.routers.routing import Losses, SparseRouting


def capacity(
    tokens: int,
    num_experts: int,
    factor: float,
    rounding: str = "ceil",
    multiple_of: int = 4,
) -> int:
    """Computes the slots per expert and group: ``tokens * factor / num_experts``, rounded, at least 1.

    Args:
        tokens: Tokens of a group. For Token Choice, multiply them by the experts per token.
        num_experts: E.
        factor: The capacity factor, > 0.
        rounding: "ceil" or "round" (half to even).
        multiple_of: Rounds the result up to a multiple of this number. 0 and 1 have no effect.
    """
    check = Check("capacity")
    tokens = check.integer("tokens", tokens, 0)
    num_experts = check.integer("num_experts", num_experts, 1)
    factor = check.number("factor", factor)
    check.choice("rounding", rounding, ("ceil", "round"))
    multiple_of = check.integer("multiple_of", multiple_of, 0)
    return slots_per_expert(tokens, num_experts, factor, rounding, multiple_of)


def slots_per_expert(tokens: int, num_experts: int, factor: float, rounding: str, multiple_of: int) -> int:
    """Computes `capacity` without checks. `tokens` may be symbolic, as under torch.compile(dynamic=True)."""
    if isinstance(tokens, torch.SymInt) and exporting():
        return _exported_slots(tokens, num_experts, factor, rounding, multiple_of)
    slots = tokens * factor / num_experts
    slots = larger(1, math.ceil(slots) if rounding == "ceil" else round(slots))
    return slots if multiple_of < 2 else (slots + multiple_of - 1) // multiple_of * multiple_of


def _exported_slots(tokens: torch.SymInt, num_experts: int, factor: float, rounding: str, multiple_of: int) -> int:
    """Computes `slots_per_expert` by ops on a tensor, with the same rounding, for torch.export.

    A symbolic formula would fail for two reasons. torch cannot prove the guards of the formula for every number of
    tokens: that the capacity is not 1, and that it does not divide the slots of all groups. torch also cannot save
    `ceil` and `round`. The value of a tensor needs no guards.
    """
    slots = torch.scalar_tensor(tokens, dtype=torch.float64, device="cpu") * factor / num_experts
    slots = (slots.ceil() if rounding == "ceil" else slots.round()).clamp(min=1)
    multiple = max(1, multiple_of)
    capacity = ((slots / multiple).ceil() * multiple).to(torch.int64).item()
    torch._check(capacity >= 1)
    return cast(int, capacity)


def token_choice(
    gates: Tensor | Gates,
    top_k: int,
    capacity: int,
    *,
    batch_priority: bool = False,
    weights: Tensor | Gates | None = None,
    renormalize: bool = False,
    mask: Tensor | None = None,
    losses: Losses | None = None,
    loss_weights: Mapping[str, float] | None = None,
) -> SparseRouting:
    """Lets every token request a slot from each of its `top_k` experts (V-MoE, arXiv 2106.05974).

    Args:
        gates: [G, T, E] floating point, or a `Gates`: the gates that select. Ties go to the lower index. A gate of
            -inf is never chosen.
        top_k: Experts per token, 1 <= K <= E.
        capacity: C, slots per expert and group.
        batch_priority: Fills the buffers in descending order of the tokens' largest gate instead of in index order.
        weights: [G, T, E], the gates that weigh (in the combine tensor), by default `gates`. A weight is NaN where the
            selecting gate is NaN.
        renormalize: Divides a token's weights by their sum over its `top_k` experts.
        mask: [G, T] bool, True = real token. Masked tokens make no request.
        losses: Auxiliary losses by name: functions that return an unweighted scalar.
        loss_weights: Weights of the losses in `Routing.aux_loss`, by name.
    """
    check = Check("token_choice")
    selecting, weighing = _check_gates(check, gates, weights, mask)
    top_k = check.integer("top_k", top_k, 1, selecting.source.shape[2])
    capacity = check.integer("capacity", capacity, 1)
    check.flag("batch_priority", batch_priority)
    check.flag("renormalize", renormalize)
    return token_choice_unchecked(
        selecting, weighing, top_k, capacity, batch_priority, renormalize, mask, losses or {}, loss_weights or {}
    )


def token_choice_unchecked(
    gates: Gates,
    weights: Gates,
    top_k: int,
    capacity: int,
    batch_priority: bool,
    renormalize: bool,
    mask: Tensor | None,
    losses: Losses,
    loss_weights: Mapping[str, float],
) -> SparseRouting:
    """Runs `token_choice` without checks."""
    best, kept, expert = _choose(gates, weights, top_k, 2, mask)
    num_experts = gates.source.shape[2]
    slot, source = assign_slots_unchecked(expert, num_experts, capacity, best[..., 0] if batch_priority else None)
    if renormalize:
        total = kept.sum(-1, keepdim=True)
        kept = kept / total.clamp(min=torch.finfo(total.dtype).tiny)
    token = source if top_k == 1 else source.div(top_k, rounding_mode="floor")
    offsets, slots, filled = invert_slots_unchecked(token, gates.source.shape[1])
    gate = _take(kept.flatten(1), source)
    return SparseRouting(
        token,
        gate,
        weights,
        offsets,
        slots,
        filled,
        expert,
        slot,
        mask,
        losses,
        loss_weights,
        selecting=None if weights is gates else gates,
    )


def expert_choice(
    gates: Tensor | Gates,
    capacity: int,
    *,
    weights: Tensor | Gates | None = None,
    renormalize: bool = False,
    mask: Tensor | None = None,
    losses: Losses | None = None,
    loss_weights: Mapping[str, float] | None = None,
) -> SparseRouting:
    """Lets every expert take the tokens of its `capacity` largest gates (arXiv 2202.09368).

    Args:
        gates: [G, T, E] floating point, or a `Gates`: the gates that select. Ties go to the lower index. A gate of
            -inf is never chosen, and its slot stays empty.
        capacity: C, slots per expert and group, clamped to T.
        weights: [G, T, E], the gates that weigh (in the combine tensor), by default `gates`. A weight is NaN where the
            selecting gate is NaN.
        renormalize: Divides a token's weights by their sum over the experts that took the token.
        mask: [G, T] bool, True = real token. Masked tokens are never taken.
        losses: Auxiliary losses by name: functions that return an unweighted scalar.
        loss_weights: Weights of the losses in `Routing.aux_loss`, by name.
    """
    check = Check("expert_choice")
    selecting, weighing = _check_gates(check, gates, weights, mask)
    capacity = check.integer("capacity", capacity, 1)
    check.flag("renormalize", renormalize)
    capacity = smaller(capacity, traced_size(selecting.source.shape[1]))
    return expert_choice_unchecked(selecting, weighing, capacity, renormalize, mask, losses or {}, loss_weights or {})


def expert_choice_unchecked(
    gates: Gates,
    weights: Gates,
    capacity: int,
    renormalize: bool,
    mask: Tensor | None,
    losses: Losses,
    loss_weights: Mapping[str, float],
) -> SparseRouting:
    """Runs `expert_choice` without checks. Requires ``capacity <= T``."""
    _, kept, token = _choose(gates, weights, capacity, 1, mask)
    offsets, slots, filled = invert_slots_unchecked(token, gates.source.shape[1])
    if renormalize:
        kept = _share(kept, token, offsets, slots)
    return SparseRouting(
        token,
        kept,
        weights,
        offsets,
        slots,
        filled,
        None,
        None,
        mask,
        losses,
        loss_weights,
        selecting=None if weights is gates else gates,
    )


def _check_gates(
    check: Check, gates: Tensor | Gates, weights: Tensor | Gates | None, mask: Tensor | None
) -> tuple[Gates, Gates]:
    """Checks the gates that select and the gates that weigh, and converts both to `Gates`."""
    selecting = as_gates(gates)
    source = check.floating("gates", selecting.source, "G T E")
    if source.shape[2] == 0:
        raise ValueError(f"{check.where}: gates must have at least one expert, got {list(source.shape)}")
    if mask is not None:
        check.mask(mask, "gates", source)
    if weights is None or weights is gates:
        return selecting, selecting
    weighing = as_gates(weights)
    check.floating("weights", weighing.source)
    check.shape("weights", weighing.source, source.shape, "G, T, E")
    check.device("weights", weighing.source, "gates", source)
    return selecting, weighing


def _choose(gates: Gates, weights: Gates, k: int, dim: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses the k largest gates. Gives the selecting gates without gradient, the weights, and the indices."""
    if weights is gates:
        kept, indices = gates.choose(k, dim, mask)
        return kept.detach(), kept, indices
    with torch.no_grad():
        best, indices = gates.choose(k, dim, mask)
    # A plan of NaN selects arbitrary tokens: the NaN must reach the output.
    kept = weights.at(indices, dim)
    return best, kept.masked_fill(best.isnan(), math.nan), indices


def _share(kept: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """Divides the weights `kept` [G, E, C] by the sum of the weights of the same token. Empty slots stay 0."""
    groups, experts, capacity = kept.shape
    ones = kept.new_ones(experts, groups, capacity, 1)
    # Dispatch the sums, because the gradient of dispatch is a combine, which adds in a fixed order on every device.
    total = dispatch_unchecked(combine_unchecked(ones, kept, token, offsets, slots), token, offsets, slots)
    return kept / total.squeeze(3).transpose(0, 1).clamp(min=torch.finfo(kept.dtype).tiny)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Gathers `values` [G, N] at `index` [G, E, C]. A negative index gives 0."""
    # A negative index reads the zero after the last value, which exists even in a group without values.
    padded = F.pad(values, (0, 1))
    where = torch.where(index < 0, values.shape[1], index)
    return padded.gather(1, where.flatten(1).long()).view(index.shape)
