"""Cases of softmax over the experts and the top-k of every token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from benchmarks.case import BACKWARD, FORWARD, VIT_B, VIT_B_BFLOAT16, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms, packages
from vmoe_routers import ops


def draw(size: Size, device: str) -> torch.Tensor:
    """Draws logits [1, n, E]. In 16 bits, the logits of a row all differ, because torch breaks ties arbitrarily."""
    logits = torch.randn(1, size.rows, size.experts, device=device)
    if size.dtype != "float32":
        logits = logits.argsort(-1) * (4 / size.experts)
    return logits.to(size.torch_dtype).requires_grad_()


def build(size: Size, device: str) -> Case:
    n, E, K = size.rows, size.experts, size.top_k
    logits = draw(size, device)
    variant = partial(Variant, leaves=(logits,))
    variants = [
        variant("ours", "ours", lambda: ops.softmax_topk(logits, K)),
        variant("argmax and mask", "naive", lambda: forms.topk_one_hot(logits, K)),
        variant("torch softmax + topk", "index", lambda: forms.topk(logits, K)),
        variant("torch topk, then softmax of k", "index", lambda: forms.topk_then_normalize(logits, K)),
    ]
    skipped: list[str] = []
    if packages.runs_triton(device):
        packages.add(variants, skipped, packages.triton_topk, logits, K)
    forward = Floor(bytes=size.itemsize * n * (E + K) + 4 * n * K, exps=n * E)
    return Case(
        op="topk",
        title="softmax + top-k",
        size=size,
        variants=tuple(variants),
        floors={FORWARD: forward, BACKWARD: forward + Floor(bytes=2 * size.itemsize * n * E, exps=n * E)},
        tolerance=size.tolerance(1e-5),
        # Variants may swap probabilities that differ by a rounding error.
        allowed=1e-3,
        skipped=tuple(skipped),
    )


# So many rows that no cache holds them.
MILLION = Size(images=4096, tokens=256, top_k=1)
TARGETED = (VIT_B, MILLION, replace(MILLION, experts=64))
ENTRIES = (
    Entry(
        "topk",
        build,
        quick=Size(),
        sweep=("experts",),
        cuda=(*TARGETED, replace(VIT_B, top_k=2), VIT_B_BFLOAT16),
        cuda_quick=TARGETED,
    ),
)
