"""Dispatch and combine of a Token Choice routing; the slots between them come out too, as experts would want them."""

from __future__ import annotations

from functools import cache, partial

import torch

from benchmarks import forms
from benchmarks.case import BACKWARD, FORWARD, Case, Entry, Floor, Size, Variant
from vmoe_routers import capacity, ops


def build(size: Size, device: str, *, one_group: bool = False) -> Case:
    G, T = (1, size.rows) if one_group else (size.images, size.tokens)
    E, K, D = size.experts, size.top_k, size.width
    C = capacity(T * K, E, 1.0, "ceil", 1)
    gates, expert = torch.randn(G, T, E, device=device).softmax(-1).topk(K)
    slot, source = ops.assign_slots(expert.int(), E, C)
    token = source.div(K, rounding_mode="floor")
    padded = torch.cat([gates.flatten(1), gates.new_zeros(G, 1)], 1)
    gate = padded.gather(1, torch.where(source < 0, T * K, source).long().flatten(1)).view(G, E, C).requires_grad_()
    x = torch.randn(G, T, D, device=device, requires_grad=True)

    # The other forms' own indices, made outside the time: rows of the batch, n for an empty slot.
    first = torch.arange(G, device=device).view(G, 1, 1)
    rows = torch.where(token < 0, G * T, first * T + token).flatten().long()
    places = torch.where(slot < 0, -1, first * E * C + slot).view(G * T, K).long()

    @cache
    def one_hot():
        return (token[:, None] == torch.arange(T, device=device).view(1, T, 1, 1)).to(x.dtype)

    def ours():
        offsets, slots = ops.invert_slots(token, T)
        y = ops.dispatch(x, token, offsets, slots)
        return [ops.combine(y, gate, token, offsets, slots), y.detach().transpose(0, 1)]

    def einsum():
        y = torch.einsum("gtec,gtd->gecd", one_hot(), x)
        return [torch.einsum("gtec,gecd->gtd", one_hot() * gate[:, None], y), y.detach()]

    def gather():
        y = forms.gather_rows(x.flatten(0, 1), rows)
        return [forms.sum_slots(y, gate.flatten(), places).view_as(x), y.detach().view(G, E, C, D)]

    def index_add():
        y = forms.gather_rows(x.flatten(0, 1), rows)
        return [forms.add_rows(y, gate.flatten(), rows, G * T).view_as(x), y.detach().view(G, E, C, D)]

    variant = partial(Variant, leaves=(x, gate))
    moved = 4 * D * (2 * G * T + 2 * G * E * C)  # tokens read, slots written; slots read, tokens written
    return Case(
        op="dispatch",
        title="dispatch + combine, " + ("one group" if one_group else "per image"),
        size=size,
        variants=(
            variant("ours", "ours", ours),
            variant("one-hot einsum", "naive", einsum),
            variant("torch gather, both ways", "index", gather),
            variant("torch index_add", "index", index_add),
        ),
        floors={FORWARD: Floor(bytes=moved), BACKWARD: Floor(bytes=2 * moved + 4 * D * G * E * C)},
    )


ENTRIES = (
    Entry("dispatch", build, quick=Size(images=16), sweep=("experts", "width")),
    # Half the tokens: the one-hot tensor grows with their square, 300 MiB here.
    Entry("dispatch", partial(build, one_group=True), default=Size(images=32), quick=Size(images=8), weight=3),
)
