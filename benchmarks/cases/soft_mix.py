"""Soft MoE's mixing, dispatch and combine, with nothing between them."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import forms
from benchmarks.case import BACKWARD, FORWARD, Case, Entry, Floor, Size, Variant
from vmoe_routers import ops


def build(size: Size, device: str) -> Case:
    G, T, E, D = size.images, size.tokens, size.experts, size.width
    S = E * max(1, round(T / E))
    # As the router makes them: products of unit vectors, times the scale.
    logits = (4 * torch.rand(G, T, S, device=device) - 2).requires_grad_()
    x = torch.randn(G, T, D, device=device, requires_grad=True)
    variant = partial(Variant, leaves=(logits, x))
    products = Floor(flops=4 * G * T * S * D, bytes=4 * G * (T * S + 2 * T * D), exps=G * T * S)
    gradients = Floor(flops=8 * G * T * S * D, bytes=4 * G * (2 * T * S + 2 * T * D))
    return Case(
        op="soft_mix",
        title="Soft MoE mixing",
        size=size,
        variants=(
            variant("ours", "ours", lambda: [ops.soft_mix(logits, ops.soft_mix(logits, x, 1), 2)]),
            variant("einsum over [g, t, e, c]", "naive", lambda: [forms.soft_mix_einsum(logits, x, E)]),
            variant("torch softmax + bmm", "index", lambda: [forms.soft_mix(logits, x)]),
            variant("torch, one exp", "index", lambda: [forms.soft_mix_one_exp(logits, x)]),
        ),
        floors={FORWARD: products, BACKWARD: products + gradients},
        tolerance=1e-4,
    )


ENTRIES = (Entry("soft_mix", build, quick=Size(images=8), sweep=("tokens", "width")),)
