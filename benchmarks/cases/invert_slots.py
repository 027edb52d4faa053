"""Cases of invert_slots, from the token of every slot to the slots of every token: per image and one group."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import FORWARD, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms
from vmoe_routers import capacity, ops

MASK_BYTES = 256 << 20  # the largest mask that is built


def build(size: Size, device: str, *, one_group: bool) -> Case:
    G, T = (1, size.rows) if one_group else (size.images, size.tokens)
    E, K = size.experts, size.top_k
    C = capacity(T * K, E, 1.0)
    expert = torch.randn(G, T, E, device=device).topk(K).indices.int()
    source = ops.assign_slots(expert, E, C)[1]
    token = source.div(K, rounding_mode="floor")
    variants = [
        Variant("ours", "ours", lambda: ops.invert_slots(token, T)[:2]),
        Variant("torch stable sort", "index", lambda: forms.invert_slots(token, T)),
    ]
    skipped = []
    mask = G * T * E * C
    if mask <= MASK_BYTES:
        variants.append(Variant("mask and nonzero", "naive", lambda: forms.invert_slots_mask(token, T)))
    else:
        skipped.append(f"mask and nonzero: its mask alone would be {mask >> 20} MiB")
    return Case(
        op="invert_slots",
        title="slots of every token, " + ("one group" if one_group else "per image"),
        size=size,
        variants=tuple(variants),
        floors={FORWARD: Floor(bytes=8 * G * E * C + 4 * G * (T + 1))},
        skipped=tuple(skipped),
    )


ENTRIES = (
    Entry("invert_slots", partial(build, one_group=True), quick=Size()),
    Entry("invert_slots", partial(build, one_group=False), quick=Size()),
)
