"""Cases of Sinkhorn with 20 iterations: one group and per image."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.case import BACKWARD, FORWARD, VIT_B, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms, packages
from vmoe_routers import sinkhorn

ITERATIONS = 20


def build(size: Size, device: str, *, one_group: bool, sigma: int = 1) -> Case:
    G, T, E = (1, size.rows, size.experts) if one_group else (size.images, size.tokens, size.experts)
    logits = torch.randn(G, T, E, device=device).mul_(sigma).requires_grad_()
    variant = partial(Variant, leaves=(logits,))
    variants = [
        variant("ours", "ours", lambda: [sinkhorn(logits, iterations=ITERATIONS)]),
        variant(
            "ours, implicit gradient",
            "ours",
            lambda: [sinkhorn(logits, iterations=ITERATIONS, gradient="implicit")],
            different_gradient="gradient of the fixed point",
        ),
        variant("log domain", "naive", lambda: [forms.sinkhorn_log(logits, ITERATIONS)]),
        variant("scaling loop", "index", lambda: [forms.sinkhorn(logits, ITERATIONS)]),
    ]
    skipped = []
    if one_group:
        variants.append(
            variant(
                "Megatron-LM's loop",
                "peer",
                lambda: [forms.sinkhorn_megatron(logits, ITERATIONS)],
                different="other marginals (1/n, 1/E), rows first",
            )
        )
        packages.add(variants, skipped, packages.pot_sinkhorn, logits, ITERATIONS)
    # Every iteration before convergence reads K at least once, from memory if K exceeds the caches. Backward takes as
    # many iterations.
    once = 4 * G * T * E
    _, history, _, _ = torch.ops.vmoe_routers.sinkhorn(logits.detach(), 1.0, ITERATIONS, 0.0, False)
    moving = 1 + int(history.diff(dim=1).any(-1).sum(1).max())
    forward = Floor(flops=4 * moving * G * T * E, bytes=2 * once, exps=G * T * E)
    return Case(
        op="sinkhorn",
        title=f"Sinkhorn, {'one group' if one_group else 'per image'}" + (f", {sigma} sigma" if sigma > 1 else ""),
        size=size,
        variants=tuple(variants),
        floors={FORWARD: forward, BACKWARD: forward + Floor(flops=8 * moving * G * T * E, bytes=2 * once)},
        tolerance=1e-4,
        skipped=tuple(skipped),
    )


# An untrained router has about standard normal logits. The iteration converges to rounding error, and the CPU kernel
# skips the remaining iterations. At a standard deviation of 4 it does not converge, and all iterations run.
ENTRIES = (
    Entry("sinkhorn", partial(build, one_group=True), quick=Size(), sweep=("experts",), cuda_quick=(VIT_B,)),
    Entry("sinkhorn", partial(build, one_group=True, sigma=4), quick=Size()),
    Entry("sinkhorn", partial(build, one_group=False), quick=Size(images=16), cuda_quick=(VIT_B,)),
)
