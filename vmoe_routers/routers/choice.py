"""How slots are filled: tokens choose experts, or experts choose tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers.ops._checks import Check
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
    check = Check("capacity")
    tokens = check.integer("tokens", tokens, 0)
    num_experts = check.integer("num_experts", num_experts, 1)
    factor = check.number("factor", factor)
    check.choice("rounding", rounding, ("ceil", "round"))
    multiple_of = check.integer("multiple_of", multiple_of, 0)
    return slots_per_expert(tokens, num_experts, factor, rounding, multiple_of)


def slots_per_expert(tokens: int, num_experts: int, factor: float, rounding: str, multiple_of: int) -> int:
    """`capacity` of arguments known to be right; `tokens` may be symbolic, as under torch.compile(dynamic=True)."""
    slots = tokens * factor / num_experts
    slots = cast(int, torch.sym_max(1, math.ceil(slots) if rounding == "ceil" else round(slots)))
    return slots if multiple_of < 2 else (slots + multiple_of - 1) // multiple_of * multiple_of


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
    """Every token asks its `top_k` experts for a place (V-MoE, arXiv 2106.05974).

    Args:
        gates: [G, T, E] floating point, or a `Gates`; they select. Ties go to the lower index; a gate
            of -inf is never chosen.
        top_k: experts per token, 1 <= K <= E.
        capacity: C, slots per expert and group.
        batch_priority: fill the buffers in descending order of the tokens' largest
            gate instead of in index order.
        weights: [G, T, E], enter the combine tensor; None: `gates`. Where the selecting gate is NaN the weight is too.
        renormalize: divide a token's weights by the sum of its top_k.
        mask: [G, T] bool, True = real token; masked tokens ask for no place.
        losses: auxiliary losses, functions that return an unweighted scalar, by name.
        loss_weights: their weights in `Routing.aux_loss`, by name.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or number.
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
    """`token_choice` of arguments known to be right."""
    best, kept, expert = _choose(gates, weights, top_k, 2, mask)
    num_experts = gates.source.shape[2]
    slot, source = assign_slots_unchecked(expert, num_experts, capacity, best[..., 0] if batch_priority else None)
    if renormalize:
        total = kept.sum(-1, keepdim=True)
        kept = kept / total.clamp(min=torch.finfo(total.dtype).tiny)
    token = source if top_k == 1 else source.div(top_k, rounding_mode="floor")
    offsets, slots, filled = invert_slots_unchecked(token, gates.source.shape[1])
    gate = _take(kept.flatten(1), source)
    return SparseRouting(token, gate, weights, offsets, slots, filled, expert, slot, mask, losses, loss_weights)


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
    """Every expert takes the tokens of its `capacity` largest gates (arXiv 2202.09368).

    Args:
        gates: [G, T, E] floating point, or a `Gates`; they select. Ties go to the lower index; a token with a gate
            of -inf is never taken, and the slot stays empty.
        capacity: C, slots per expert and group, clamped to T.
        weights: [G, T, E], enter the combine tensor; None: `gates`. Where the selecting gate is NaN the weight is too.
        renormalize: divide a token's weights by their sum over the experts that took it.
        mask: [G, T] bool, True = real token; masked tokens are never taken.
        losses: auxiliary losses, functions that return an unweighted scalar, by name.
        loss_weights: their weights in `Routing.aux_loss`, by name.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or number.
    """
    check = Check("expert_choice")
    selecting, weighing = _check_gates(check, gates, weights, mask)
    capacity = check.integer("capacity", capacity, 1)
    check.flag("renormalize", renormalize)
    capacity = cast(int, torch.sym_min(capacity, selecting.source.shape[1]))
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
    """`expert_choice` of arguments known to be right, ``capacity <= T``."""
    _, kept, token = _choose(gates, weights, capacity, 1, mask)
    offsets, slots, filled = invert_slots_unchecked(token, gates.source.shape[1])
    if renormalize:
        kept = _share(kept, token, offsets, slots)
    return SparseRouting(token, kept, weights, offsets, slots, filled, None, None, mask, losses, loss_weights)


def _check_gates(
    check: Check, gates: Tensor | Gates, weights: Tensor | Gates | None, mask: Tensor | None
) -> tuple[Gates, Gates]:
    """The gates that select and the gates that weigh, as `Gates`."""
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
    """The k chosen: their selecting gates without gradient, their weights, and their indices."""
    if weights is gates:
        kept, indices = gates.choose(k, dim, mask)
        return kept.detach(), kept, indices
    with torch.no_grad():
        best, indices = gates.choose(k, dim, mask)
    # A plan that a NaN has spoiled chooses tokens at random: the NaN has to reach the output.
    kept = weights.at(indices, dim)
    return best, kept.masked_fill(best.isnan(), math.nan), indices


def _share(kept: Tensor, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """kept [G, E, C] over the sum of the same token's weights; 0 in empty slots."""
    groups, experts, capacity = kept.shape
    ones = kept.new_ones(experts, groups, capacity, 1)
    # A dispatch of the sums: its gradient is a combine, which adds in one order on every device.
    total = dispatch_unchecked(combine_unchecked(ones, kept, token, offsets, slots), token, offsets, slots)
    return kept / total.squeeze(3).transpose(0, 1).clamp(min=torch.finfo(kept.dtype).tiny)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values [G, N] at index [G, E, C], 0 where the index is negative."""
    # Index N reads the zero after the last value, so a group without values works too.
    padded = F.pad(values, (0, 1))
    where = torch.where(index < 0, values.shape[1], index)
    return padded.gather(1, where.flatten(1).long()).view(index.shape)
