"""Places in the experts' buffers with batch priority: per image, and of the whole batch as one group."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import forms
from benchmarks.case import FORWARD, Case, Entry, Floor, Size, Variant
from vmoe_routers import capacity, ops


def build(size: Size, device: str, *, one_group: bool) -> Case:
    G, T = (1, size.rows) if one_group else (size.images, size.tokens)
    E, K = size.experts, size.top_k
    C = capacity(T * K, E, 1.0)
    priority, expert = torch.randn(G, T, E, device=device).softmax(-1).topk(K)
    expert, priority = expert.int(), priority[..., 0].contiguous()
    return Case(
        op="assign_slots",
        title="slots with batch priority, " + ("one group" if one_group else "per image"),
        size=size,
        variants=(
            Variant("ours", "ours", lambda: ops.assign_slots(expert, E, C, priority)),
            Variant("one-hot cumsum", "naive", lambda: forms.slots_one_hot(expert, E, C, priority)),
            Variant("torch stable sort", "index", lambda: forms.slots(expert, E, C, priority)),
        ),
        floors={FORWARD: Floor(bytes=4 * G * T + 8 * G * T * K + 4 * G * E * C)},
    )


ENTRIES = (
    Entry("assign_slots", partial(build, one_group=True), quick=Size(), sweep=("experts",)),
    Entry("assign_slots", partial(build, one_group=False), quick=Size()),
)
