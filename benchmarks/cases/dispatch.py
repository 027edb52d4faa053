"""Cases of dispatch and combine of a Token Choice routing; on a GPU also each op alone.

The outputs contain the slots between both ops, in the layout that experts need.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, FORWARD, VIT_B, VIT_B_BFLOAT16, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms, packages
from vmoe_routers import capacity, ops


@dataclass(frozen=True)
class Drawn:
    """Inputs of the variants.

    Attributes:
        x: Tokens [G, T, D].
        token: Token of every slot [G, E, C], for our ops.
        gate: Gate of every slot [G, E, C].
        rows: Position of every slot's token in the batch [G * E * C]; G * T for an empty slot. For variants other than
            ours.
        places: Slots of every token [G * T, K], numbered over all groups; -1 for a dropped request. For variants other
            than ours.
    """

    x: Tensor
    token: Tensor
    gate: Tensor
    rows: Tensor
    places: Tensor


def draw(size: Size, device: str, *, one_group: bool) -> Drawn:
    G, T = (1, size.rows) if one_group else (size.images, size.tokens)
    E, K, D = size.experts, size.top_k, size.width
    C = capacity(T * K, E, 1.0, "ceil", 1)
    gates, expert = torch.randn(G, T, E, device=device).softmax(-1).topk(K)
    slot, source = ops.assign_slots(expert.int(), E, C)
    token = source.div(K, rounding_mode="floor")
    padded = torch.cat([gates.flatten(1), gates.new_zeros(G, 1)], 1)
    gate = padded.gather(1, torch.where(source < 0, T * K, source).long().flatten(1)).view(G, E, C).requires_grad_()
    x = torch.randn(G, T, D, device=device).to(size.torch_dtype).requires_grad_()
    first = torch.arange(G, device=device).view(G, 1, 1)
    rows = torch.where(token < 0, G * T, first * T + token).flatten().long()
    places = torch.where(slot < 0, -1, first * E * C + slot).view(G * T, K).long()
    return Drawn(x, token, gate, rows, places)


def build(size: Size, device: str, *, one_group: bool = False) -> Case:
    drawn = draw(size, device, one_group=one_group)
    x, token, gate, rows, places = drawn.x, drawn.token, drawn.gate, drawn.rows, drawn.places
    (G, T, D), (_, E, C) = x.shape, token.shape

    @cache
    def one_hot():
        return (token[:, None] == torch.arange(T, device=device).view(1, T, 1, 1)).to(x.dtype)

    def ours():
        offsets, slots, _ = ops.invert_slots(token, T)
        y = ops.dispatch(x, token, offsets, slots)
        return [ops.combine(y, gate, token, offsets, slots), y.detach().transpose(0, 1)]

    def einsum():
        y = torch.einsum("gtec,gtd->gecd", one_hot(), x)
        return [torch.einsum("gtec,gecd->gtd", one_hot() * gate[:, None].to(x.dtype), y), y.detach()]

    def gather():
        y = forms.gather_rows(x.flatten(0, 1), rows)
        return [forms.sum_slots(y, gate.flatten(), places).view_as(x), y.detach().view(G, E, C, D)]

    def index_add():
        y = forms.gather_rows(x.flatten(0, 1), rows)
        return [forms.add_rows(y, gate.flatten(), rows, G * T).view_as(x), y.detach().view(G, E, C, D)]

    variant = partial(Variant, leaves=(x, gate))
    variants = [
        variant("ours", "ours", ours),
        variant("one-hot einsum", "naive", einsum),
        variant("torch gather, both ways", "index", gather),
        variant("torch index_add", "index", index_add),
    ]
    skipped: list[str] = []
    if packages.runs_triton(device):
        packages.add(variants, skipped, packages.triton_rows, x, token.shape, gate, rows, places)
    # Dispatch reads tokens and writes slots. Combine reads slots and writes tokens.
    moved = size.itemsize * D * (2 * G * T + 2 * G * E * C)
    return Case(
        op="dispatch",
        title="dispatch + combine, " + ("one group" if one_group else "per image"),
        size=size,
        variants=tuple(variants),
        floors={FORWARD: Floor(bytes=moved), BACKWARD: Floor(bytes=2 * moved + size.itemsize * D * G * E * C)},
        tolerance=size.tolerance(1e-5),
        skipped=tuple(skipped),
    )


def build_dispatch(size: Size, device: str) -> Case:
    drawn = draw(size, device, one_group=True)
    x, token, rows = drawn.x, drawn.token, drawn.rows
    (G, T, D), (_, E, C) = x.shape, token.shape
    offsets, slots, _ = ops.invert_slots(token, T)
    variant = partial(Variant, leaves=(x,))
    variants = [
        variant("ours", "ours", lambda: [ops.dispatch(x, token, offsets, slots).transpose(0, 1)]),
        variant("torch gather", "index", lambda: [forms.gather_rows(x.flatten(0, 1), rows).view(G, E, C, D)]),
        variant(
            "torch index_select",
            "index",
            lambda: [x.flatten(0, 1).index_select(0, rows.clamp(max=G * T - 1)).view(G, E, C, D)],
            different="empty slots are not zeros",
        ),
    ]
    skipped: list[str] = []
    if packages.runs_triton(device):
        packages.add(variants, skipped, packages.triton_gather, x, token.shape, rows)
    filled = int((token >= 0).sum())
    moved = size.itemsize * D * (filled + G * E * C)
    back = size.itemsize * D * (filled + G * T)
    return Case(
        op="dispatch",
        title="dispatch, one group",
        size=size,
        variants=tuple(variants),
        floors={FORWARD: Floor(bytes=moved), BACKWARD: Floor(bytes=moved + back)},
        tolerance=size.tolerance(1e-5),
        skipped=tuple(skipped),
    )


def build_combine(size: Size, device: str) -> Case:
    drawn = draw(size, device, one_group=True)
    token, gate, rows, places = drawn.token, drawn.gate, drawn.rows, drawn.places
    (G, T, D), (_, E, C) = drawn.x.shape, token.shape
    offsets, slots, _ = ops.invert_slots(token, T)
    y = torch.randn(E, G, C, D, device=device).to(size.torch_dtype).requires_grad_()
    flat = y.transpose(0, 1).reshape(G * E * C, D)  # a view, because G is 1
    variant = partial(Variant, leaves=(y, gate))
    variants = [
        variant("ours", "ours", lambda: [ops.combine(y, gate, token, offsets, slots)]),
        variant("torch gather", "index", lambda: [forms.sum_slots(flat, gate.flatten(), places).view(G, T, D)]),
        variant("torch index_add", "index", lambda: [forms.add_rows(flat, gate.flatten(), rows, G * T).view(G, T, D)]),
    ]
    skipped: list[str] = []
    if packages.runs_triton(device):
        packages.add(variants, skipped, packages.triton_sum_slots, flat, gate, places, (G, T, D))
    filled = int((token >= 0).sum())
    moved = size.itemsize * D * (filled + G * T)
    # Backward reads y and the gradient of its token for every filled slot, and writes the gradient of y.
    back = size.itemsize * D * (2 * filled + G * E * C)
    return Case(
        op="dispatch",
        title="combine, one group",
        size=size,
        variants=tuple(variants),
        floors={FORWARD: Floor(bytes=moved), BACKWARD: Floor(bytes=moved + back)},
        tolerance=size.tolerance(1e-5),
        skipped=tuple(skipped),
    )


cuda = (VIT_B, VIT_B_BFLOAT16)
ENTRIES = (
    Entry("dispatch", build, quick=Size(images=16), sweep=("experts", "width"), cuda=cuda),
    # Half the images: the one-hot tensor grows with the square of the tokens; it has 300 MiB here.
    Entry("dispatch", partial(build, one_group=True), Size(images=32), Size(images=8), weight=3, cuda=cuda),
    Entry("dispatch", build_dispatch, only_cuda=True, cuda=cuda, cuda_quick=(VIT_B_BFLOAT16,)),
    Entry("dispatch", build_combine, only_cuda=True, cuda=cuda, cuda_quick=(VIT_B_BFLOAT16,)),
)
