"""Cases of sparsity-constrained transport: 20 steps of Adam, and L-BFGS against POT's solver."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import BACKWARD, FORWARD, VIT_B, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms, packages
from vmoe_routers import capacity, ksparse_transport
from vmoe_routers.ops import reference

ITERATIONS = 20


def floors(G: int, T: int, E: int) -> dict[str, Floor]:
    # A step adds and compares every score. Scores are read from memory once.
    forward = Floor(flops=2 * ITERATIONS * G * T * E, bytes=8 * G * T * E)
    return {FORWARD: forward, BACKWARD: forward + Floor(bytes=12 * G * T * E)}


def build(size: Size, device: str, *, one_group: bool) -> Case:
    G, T, E = (1, size.rows, size.experts) if one_group else (size.images, size.tokens, size.experts)
    k = capacity(T, E, 1.0, "round", 1)
    similarity = torch.randn(G, T, E, device=device).softmax(-1).requires_grad_()
    variant = partial(Variant, leaves=(similarity,))
    return Case(
        op="ksparse_transport",
        title="k-sparse transport, Adam, " + ("one group" if one_group else "per image"),
        size=size,
        variants=(
            variant("ours", "ours", lambda: [ksparse_transport(similarity, k, iterations=ITERATIONS)]),
            variant("sort and mask", "naive", lambda: [reference.ksparse_transport(similarity, k)]),
            variant("torch topk, batched", "index", lambda: [forms.ksparse_transport(similarity, k, ITERATIONS)]),
        ),
        floors=floors(G, T, E),
        # Rounding errors decide which token is the k-th and last chosen token of a column.
        tolerance=1e-3,
        allowed=1e-2,
    )


def build_lbfgs(size: Size, device: str) -> Case:
    T, E = size.tokens, size.experts
    k = capacity(T, E, 1.0, "round", 1)
    similarity = torch.randn(1, T, E, device=device, dtype=torch.float64).softmax(-1)
    variants = [
        Variant("ours", "ours", lambda: [ksparse_transport(similarity, k, iterations=ITERATIONS, solver="lbfgs")]),
    ]
    skipped: list[str] = []
    packages.add(variants, skipped, packages.pot_ksparse, similarity, k, ITERATIONS)
    return Case(
        op="ksparse_transport",
        title="k-sparse transport, L-BFGS, one image, float64",
        size=size,
        variants=tuple(variants),
        floors={FORWARD: floors(1, T, E)[FORWARD]},
        skipped=tuple(skipped),
    )


ONE = Size(images=1)
ENTRIES = (
    Entry("ksparse_transport", partial(build, one_group=False), quick=Size(images=8), cuda_quick=(VIT_B,)),
    Entry("ksparse_transport", partial(build, one_group=True), quick=Size(images=16)),
    Entry("ksparse_transport", build_lbfgs, default=ONE, quick=ONE, cuda=(ONE,)),
)
