"""Softmax over the experts, and the top-k of every token."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import forms
from benchmarks.case import BACKWARD, FORWARD, Case, Entry, Floor, Size, Variant
from vmoe_routers import ops


def build(size: Size, device: str) -> Case:
    n, E, K = size.rows, size.experts, size.top_k
    logits = torch.randn(1, n, E, device=device, requires_grad=True)
    variant = partial(Variant, leaves=(logits,))
    forward = Floor(bytes=4 * n * E + 8 * n * K, exps=n * E)
    return Case(
        op="topk",
        title="softmax + top-k",
        size=size,
        variants=(
            variant("ours", "ours", lambda: ops.softmax_topk(logits, K)),
            variant("argmax and mask", "naive", lambda: forms.topk_one_hot(logits, K)),
            variant("torch softmax + topk", "index", lambda: forms.topk(logits, K)),
            variant("torch topk, then softmax of k", "index", lambda: forms.topk_then_normalize(logits, K)),
        ),
        floors={FORWARD: forward, BACKWARD: forward + Floor(bytes=8 * n * E, exps=n * E)},
        # Probabilities one rounding apart may change places.
        allowed=1e-3,
    )


ENTRIES = (Entry("topk", build, quick=Size(), sweep=("experts",)),)
