"""Cases of the layers of installed packages, against our layer with the same function: no biases, exact GELU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import VIT_B, Case, Entry, Size, Variant
from benchmarks.cases.layer import DEFAULT, QUICK, floors, make
from benchmarks.peers import hugging_face, layers, packages
from vmoe_routers import MoEMlp


def build(size: Size, device: str, title: str, torch_forms: Sequence[tuple[str, Callable]], **options: Any):
    """Makes our layer and the parts of its case.

    Returns:
        The layer, its input, the variants of this package and of torch, the lines of skipped packages, and a function
        that makes the case. The caller adds the variants of other packages.
    """
    layer = make(size, device, router="softmax_token_choice", act_layer=nn.GELU, bias=False, **options)
    x = torch.randn(size.images, size.tokens, size.width, device=device, requires_grad=True)
    leaves = (x, layer.router.weight, layer.experts.w1, layer.experts.w2)
    groups = (size.images // layer.group_size, layer.group_size * size.tokens, size.width)

    def torch_form(form):
        return lambda: [form(layer, x.view(groups)).view_as(x)]

    variants = [Variant("ours", "ours", lambda: [layer(x)], leaves=leaves)]
    variants += [Variant(name, "index", torch_form(form), leaves=leaves) for name, form in torch_forms]
    skipped: list[str] = []

    def case() -> Case:
        rows = size.rows * size.top_k
        return Case(
            op="layer",
            title=title,
            size=size,
            variants=(*variants, layers.dense(x, rows)),
            floors=floors(rows, size),
            # If the gates of two experts differ by a rounding error, a variant may send a token to the other expert.
            tolerance=1e-3,
            allowed=1e-2,
            skipped=tuple(skipped),
        )

    return layer, x, variants, skipped, case


BUFFERS = ("torch gather + bmm + index_add", layers.gather_bmm)
ROUND = {"capacity_rounding": "round", "capacity_multiple_of": 1}


def top2(size: Size, device: str) -> Case:
    """Builds the case of lucidrains' packages: top-2, renormalised, buffers per image."""
    title = "layer of lucidrains' packages, top-2 renormalised, per image"
    layer, x, variants, skipped, case = build(size, device, title, [BUFFERS], top_k=2, renormalize=True, **ROUND)
    for peer in (packages.mixture_of_experts, packages.st_moe_pytorch):
        packages.add(variants, skipped, peer, layer, x, layer.router.slots(size.tokens))
    return case()


def top1(size: Size, device: str) -> Case:
    """Builds the case of Switch Transformers: top-1, buffers per image."""
    size = replace(size, top_k=1)
    title = "layer of Switch Transformers, top-1, per image"
    layer, x, variants, skipped, case = build(size, device, title, [BUFFERS], top_k=1, **ROUND)
    packages.add(variants, skipped, hugging_face.transformers_switch, layer, x, layer.router.slots(size.tokens))
    return case()


def dropless(size: Size, device: str) -> Case:
    """Builds the case of transformers' MoE blocks: top-2, renormalised, without a capacity.

    Our layer gets the smallest capacity that drops nothing.
    """
    forms = [BUFFERS, ("grouped_mm", layers.grouped)]
    options = {"top_k": 2, "renormalize": True, "group_size": size.images}
    title = "layer of transformers, top-2 renormalised, nothing dropped, one group"
    layer, x, variants, skipped, case = build(size, device, title, forms, **options)
    layer.router.eval_capacity_factor = fullest(layer, x) * size.experts / (2 * size.rows)
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        packages.add(variants, skipped, hugging_face.transformers_experts, layer, x, implementation)
    packages.add(variants, skipped, hugging_face.transformers_mixtral, layer, x)
    return case()


def fullest(layer: MoEMlp, x: Tensor) -> int:
    """Returns the number of requests of the expert that gets the most."""
    chosen = F.linear(x.detach().flatten(0, 1), layer.router.weight).topk(layer.router.top_k).indices
    return math.ceil(chosen.flatten().bincount().max().item())


entry = partial(Entry, "layer", default=DEFAULT, quick=QUICK, weight=12, cuda=(replace(VIT_B, top_k=2),))
ENTRIES = tuple(entry(build) for build in (top2, top1, dropless))
