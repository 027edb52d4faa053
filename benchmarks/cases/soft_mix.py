"""Case of the mixing of Soft MoE: logits, dispatch and combine, without experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.case import BACKWARD, FORWARD, VIT_B, Case, Entry, Floor, Size, Variant
from benchmarks.peers import forms
from vmoe_routers import ops


def build(size: Size, device: str) -> Case:
    G, T, E, D = size.images, size.tokens, size.experts, size.width
    S = E * max(1, round(T / E))
    x = torch.randn(G, T, D, device=device).to(size.torch_dtype).requires_grad_()
    # Phi as the router makes it, with a scale at which the logits are about 1 in size.
    phi = (D**0.5 * F.normalize(torch.randn(D, S, device=device), dim=0)).to(size.torch_dtype).requires_grad_()
    variant = partial(Variant, leaves=(x, phi))

    def ours():
        logits = ops.soft_logits(x, phi)
        return [ops.soft_mix(logits, ops.soft_mix(logits, x, 1, E), 2)]

    moved = size.itemsize
    products = Floor(6 * G * T * S * D, moved * (2 * G * T * D + D * S), G * T * S, size.dtype)
    gradients = Floor(flops=12 * G * T * S * D, bytes=moved * (3 * G * T * D + 2 * D * S))
    return Case(
        op="soft_mix",
        title="Soft MoE mixing",
        size=size,
        variants=(
            variant("ours", "ours", ours),
            variant("einsum over [g, t, e, c]", "naive", lambda: [forms.soft_mix_einsum(x, phi, E)]),
            variant("torch softmax + bmm", "index", lambda: [forms.soft_mix(x, phi)]),
            variant("torch, one exp", "index", lambda: [forms.soft_mix_one_exp(x, phi)]),
            variant("torch attention, twice", "index", lambda: [forms.soft_mix_attention(x, phi)]),
        ),
        floors={FORWARD: products, BACKWARD: products + gradients},
        tolerance=size.tolerance(1e-4),
    )


SQUARE = replace(VIT_B, experts=28)  # as many slots as tokens, 196
SQUARE_BFLOAT16 = replace(SQUARE, dtype="bfloat16")
ENTRIES = (
    Entry(
        "soft_mix",
        build,
        quick=Size(images=8),
        sweep=("tokens", "width"),
        cuda=(SQUARE_BFLOAT16, SQUARE),
        cuda_quick=(SQUARE_BFLOAT16,),
    ),
)
