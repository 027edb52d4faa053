"""Cases of softmax over the experts and the top-C tokens of every expert: per image and one group."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import BACKWARD, FORWARD, VIT_B, VIT_B_BFLOAT16, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms
from vmoe_routers import capacity, ops


def build(size: Size, device: str, *, one_group: bool) -> Case:
    G, T, E = (1, size.rows, size.experts) if one_group else (size.images, size.tokens, size.experts)
    C = capacity(T, E, 1.0, "round", 1)
    logits = torch.randn(G, T, E, device=device).to(size.torch_dtype).requires_grad_()

    def by_expert(results):
        # torch's results are [G, C, E].
        return [result.transpose(1, 2) for result in results]

    def sort():
        values, tokens = forms.softmax(logits).sort(dim=1, descending=True)
        return [values[:, :C].to(logits.dtype), tokens[:, :C]]

    def transposed():
        values, tokens = forms.softmax(logits).transpose(1, 2).contiguous().topk(C)
        return [values.to(logits.dtype), tokens]

    variant = partial(Variant, leaves=(logits,))
    return Case(
        op="expert_choice",
        title="expert choice, one group" if one_group else "expert choice, per image",
        size=size,
        variants=(
            variant("ours", "ours", lambda: ops.softmax_topk(logits, C, dim=1)),
            variant("torch sort", "naive", sort, canonical=by_expert),
            variant("torch softmax + topk(dim=1)", "index", lambda: forms.topk(logits, C, 1), canonical=by_expert),
            variant("torch, transposed first", "index", transposed),
        ),
        floors={
            FORWARD: Floor(bytes=size.itemsize * G * E * (T + C) + 4 * G * E * C, exps=G * T * E),
            BACKWARD: Floor(bytes=size.itemsize * G * E * (3 * T + 2 * C) + 8 * G * E * C, exps=2 * G * T * E),
        },
        tolerance=size.tolerance(1e-5),
        # Among equal probabilities, our op takes the lower index, and torch.topk takes any index.
        allowed=5e-3,
    )


entry = partial(Entry, "expert_choice", quick=Size(images=32), cuda=(VIT_B, VIT_B_BFLOAT16), cuda_quick=(VIT_B,))
ENTRIES = (
    entry(partial(build, one_group=False), sweep=("tokens", "experts")),
    entry(partial(build, one_group=True), sweep=("experts",)),
)
