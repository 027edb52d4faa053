"""Cases of whole layers: each router against torch code, packages, and the dense MLP of the same FLOPs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.case import BACKWARD, FORWARD, VIT_B, VIT_B_BFLOAT16, Case, Entry, Floor, Size, Variant
from benchmarks.peers import layers, packages
from vmoe_routers import MoEMlp

EINSUM_BYTES = 256 << 20  # the largest dispatch tensor that is built


def make(size: Size, device: str, **options: Any) -> MoEMlp:
    """Makes our layer, in eval mode. The hidden width of its experts is 4 D."""
    same = {"num_experts": size.experts, "device": device, "dtype": size.torch_dtype}
    return MoEMlp(size.width, 4 * size.width, **same, **options).eval()


def floors(rows: int, size: Size, extra: int = 0) -> dict[str, Floor]:
    """Counts two products over `rows` rows.

    Each product reads its weights and rows once. With gradients, all counts are three times as high.
    """
    D, E = size.width, size.experts
    flops = 2 * 2 * rows * D * 4 * D + extra
    moved = size.itemsize * (2 * size.rows * D + 8 * E * D * D)
    return {
        FORWARD: Floor(flops, moved, dtype=size.dtype),
        BACKWARD: Floor(3 * flops, 3 * moved, dtype=size.dtype),
    }


def sparse(size: Size, device: str, *, router: str, one_group: bool = True, top_k: int = 1) -> Case:
    size = replace(size, top_k=top_k)
    options = {"top_k": top_k} if router.endswith("token_choice") else {}
    group = size.images if one_group else 1
    layer = make(size, device, router=router, group_size=group, **options)
    x = torch.randn(size.images, size.tokens, size.width, device=device).to(size.torch_dtype).requires_grad_()
    grouped = x.view(size.images // group, group * size.tokens, size.width)
    experts = layer.experts
    leaves = (x, layer.router.weight, experts.w1, experts.b1, experts.w2, experts.b2)
    variant = partial(Variant, leaves=leaves)

    def torch_form(form):
        return lambda: [form(layer, x.view(grouped.shape)).view_as(x)]

    variants = [
        variant("ours", "ours", lambda: [layer(x)]),
        variant("torch gather + bmm + index_add", "index", torch_form(layers.gather_bmm)),
    ]
    skipped = []
    if router == "softmax_token_choice":
        variants.append(variant("loop over experts", "index", torch_form(layers.loop)))
        variants.append(variant("grouped_mm", "index", torch_form(layers.grouped)))
        rows = max(1, size.rows * top_k // size.experts)
        if packed := layers.packed_mlps(experts.w1, experts.b1, experts.w2, experts.b2, rows):
            in_onednn = lambda: [layers.loop(layer, x.view(grouped.shape), packed).view_as(x)]  # noqa: E731
            variants.append(Variant("loop over experts, packed for oneDNN", "peer", in_onednn))
        dense_bytes = size.itemsize * size.rows * size.experts * layer.router.slots(grouped.shape[1])
        if dense_bytes <= EINSUM_BYTES:
            variants.append(variant("one-hot einsum", "naive", torch_form(layers.einsum)))
        else:
            skipped.append(f"one-hot einsum: its dispatch tensor alone would be {dense_bytes >> 20} MiB")
    variants.append(layers.dense(x, size.rows * top_k))
    return Case(
        op="layer",
        title=f"layer, {router}, K={top_k}, " + ("one group" if one_group else "per image"),
        size=size,
        variants=tuple(variants),
        floors=floors(size.rows * top_k, size),
        # If the gates of two experts differ by a rounding error, a variant may send a token to the other expert.
        tolerance=size.tolerance(1e-3),
        allowed=1e-2,
        skipped=tuple(skipped),
    )


def soft(size: Size, device: str) -> Case:
    slots = max(1, round(size.tokens / size.experts))
    layer = make(size, device, router="soft", slots_per_expert=slots, act_layer=nn.GELU)
    # For tokens of length sqrt(D), soft-moe-pytorch computes the same function.
    x = F.normalize(torch.randn(size.images, size.tokens, size.width, device=device), dim=-1) * size.width**0.5
    x = x.to(size.torch_dtype).requires_grad_()
    experts = layer.experts
    # In 16 bits the gradient of the scale is left out, because it is a sum over all entries whose terms nearly cancel.
    scale = (layer.router.scale,) if size.dtype == "float32" else ()
    leaves = (x, layer.router.phi, *scale, experts.w1, experts.b1, experts.w2, experts.b2)
    variant = partial(Variant, leaves=leaves)
    variants = [
        variant("ours", "ours", lambda: [layer(x)]),
        variant("bwconrad's form", "naive", lambda: [layers.soft_einsum(layer, x)]),
        variant("torch softmax + bmm", "index", lambda: [layers.soft(layer, x)]),
    ]
    skipped: list[str] = []
    packages.add(variants, skipped, packages.soft_moe_pytorch, layer, x)
    rows = size.images * size.experts * slots
    variants.append(layers.dense(x, rows))
    mixing = 3 * 2 * size.images * size.tokens * size.experts * slots * size.width
    return Case(
        op="layer",
        title="layer, soft",
        size=size,
        variants=tuple(variants),
        floors=floors(rows, size, mixing),
        tolerance=size.tolerance(1e-3),
        skipped=tuple(skipped),
    )


# 98 rows per expert at K = 1, the fewest for which targets hold.
DEFAULT = Size(images=16)
QUICK = Size(images=4, experts=8, width=192)
NAMES = (
    "sinkhorn_token_choice",
    "softmax_expert_choice",
    "sinkhorn_expert_choice",
    "sparsity_constrained_expert_choice",
)
entry = partial(Entry, "layer", default=DEFAULT, quick=QUICK, weight=6, cuda=(VIT_B_BFLOAT16, VIT_B))
ENTRIES = (
    entry(partial(sparse, router="softmax_token_choice"), sweep=("experts", "width"), cuda_quick=(VIT_B_BFLOAT16,)),
    entry(partial(sparse, router="softmax_token_choice", top_k=2), weight=12),
    entry(partial(sparse, router="softmax_token_choice", one_group=False)),
    *(entry(partial(sparse, router=name)) for name in NAMES),
    entry(soft, sweep=("tokens",), cuda_quick=(VIT_B_BFLOAT16,)),
)
