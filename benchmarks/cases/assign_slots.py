"""Cases of assign_slots: with batch priority, per image and one group; on a GPU also without batch priority."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import FORWARD, VIT_B, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms
from vmoe_routers import capacity, ops


def build(size: Size, device: str, *, one_group: bool, batch_priority: bool = True) -> Case:
    G, T = (1, size.rows) if one_group else (size.images, size.tokens)
    E, K = size.experts, size.top_k
    C = capacity(T * K, E, 1.0)
    gates, expert = torch.randn(G, T, E, device=device).softmax(-1).topk(K)
    expert, priority = expert.int(), gates[..., 0].contiguous() if batch_priority else None
    return Case(
        op="assign_slots",
        title=("slots with batch priority, " if batch_priority else "slots in the tokens' order, ")
        + ("one group" if one_group else "per image"),
        size=size,
        variants=(
            Variant("ours", "ours", lambda: ops.assign_slots(expert, E, C, priority)),
            Variant("one-hot cumsum", "naive", lambda: forms.slots_one_hot(expert, E, C, priority)),
            Variant("torch stable sort", "index", lambda: forms.slots(expert, E, C, priority)),
        ),
        floors={FORWARD: Floor(bytes=4 * G * T * batch_priority + 8 * G * T * K + 4 * G * E * C)},
    )


entry = partial(Entry, "assign_slots", quick=Size(), cuda_quick=(VIT_B,))
ENTRIES = (
    entry(partial(build, one_group=True), sweep=("experts",)),
    entry(partial(build, one_group=False)),
    entry(partial(build, one_group=True, batch_priority=False), only_cuda=True),
)
