"""Softmax over the experts, and every expert's top-C tokens: per image, and of the whole batch as one group."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import BACKWARD, FORWARD, Case, Entry, Floor, Size, Variant
from vmoe_routers import capacity, ops


def build(size: Size, device: str, *, one_group: bool) -> Case:
    G, T, E = (1, size.rows, size.experts) if one_group else (size.images, size.tokens, size.experts)
    C = capacity(T, E, 1.0, "round", 1)
    logits = torch.randn(G, T, E, device=device, requires_grad=True)

    def by_expert(results):
        # torch leaves the chosen axis where it was: [G, C, E].
        return [result.transpose(1, 2) for result in results]

    variant = partial(Variant, leaves=(logits,))
    return Case(
        op="expert_choice",
        title="expert choice, one group" if one_group else "expert choice, per image",
        size=size,
        variants=(
            variant("ours", "ours", lambda: ops.softmax_topk(logits, C, dim=1)),
            variant(
                "torch sort",
                "naive",
                lambda: [x[:, :C] for x in logits.softmax(-1).sort(dim=1, descending=True)],
                canonical=by_expert,
            ),
            variant("torch softmax + topk(dim=1)", "index", lambda: logits.softmax(-1).topk(C, 1), canonical=by_expert),
            variant(
                "torch, transposed first", "index", lambda: logits.softmax(-1).transpose(1, 2).contiguous().topk(C)
            ),
        ),
        floors={
            FORWARD: Floor(bytes=4 * G * T * E + 8 * G * E * C, exps=G * T * E),
            BACKWARD: Floor(bytes=12 * G * T * E + 16 * G * E * C, exps=2 * G * T * E),
        },
        # Equal probabilities: ours takes the lower index, torch.topk either.
        allowed=5e-3,
    )


ENTRIES = (
    Entry("expert_choice", partial(build, one_group=False), quick=Size(images=32), sweep=("tokens", "experts")),
    Entry("expert_choice", partial(build, one_group=True), quick=Size(images=32), sweep=("experts",)),
)
