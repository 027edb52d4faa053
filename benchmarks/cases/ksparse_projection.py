"""Cases that project the scores of every expert onto the simplex with at most k non-zeros."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import BACKWARD, FORWARD, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms, packages
from vmoe_routers import capacity, ksparse_projection
from vmoe_routers.ops import reference


def build(size: Size, device: str, *, one_group: bool) -> Case:
    G, T, E = (1, size.rows, size.experts) if one_group else (size.images, size.tokens, size.experts)
    k = capacity(T, E, 1.0, "round", 1)
    # Scores are so close to each other that the projection has k non-zeros, as in the transport.
    x = (torch.randn(G, E, T, device=device) / (4 * k)).requires_grad_()
    variant = partial(Variant, leaves=(x,))
    variants = [
        variant("ours", "ours", lambda: [ksparse_projection(x, k)]),
        variant("sort and mask", "naive", lambda: [reference.ksparse_projection(x, k)]),
        variant("torch topk", "index", lambda: [forms.ksparse_projection(x, k)]),
    ]
    skipped: list[str] = []
    packages.add(variants, skipped, packages.pot_projection, x, k)
    moved = 8 * G * E * T
    return Case(
        op="ksparse_projection",
        title="k-sparse projection, columns of " + ("one group" if one_group else "an image"),
        size=size,
        variants=tuple(variants),
        floors={FORWARD: Floor(bytes=moved), BACKWARD: Floor(bytes=2 * moved + 4 * G * E * T)},
        skipped=tuple(skipped),
    )


ENTRIES = (
    Entry("ksparse_projection", partial(build, one_group=False), quick=Size(images=16)),
    Entry("ksparse_projection", partial(build, one_group=True), quick=Size(images=16)),
)
