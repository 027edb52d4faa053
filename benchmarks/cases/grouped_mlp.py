"""Cases of the experts alone, on the buffers of a Token Choice routing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.case import BACKWARD, FORWARD, VIT_B, VIT_B_BFLOAT16, Case, Entry, Floor, Size, Variant
from benchmarks.peers.layers import dense, packed_mlps
from vmoe_routers import capacity
from vmoe_routers.experts import mlp_of_slots


def build(size: Size, device: str, *, one_group: bool = True) -> Case:
    E, D, K = size.experts, size.width, size.top_k
    G = 1 if one_group else size.images
    C = capacity(size.rows // G * K, E, 1.0)
    gates = torch.randn(G, size.rows // G, E, device=device)
    wanted = F.one_hot(gates.topk(K).indices, E).sum((1, 2))  # [G, E]
    filled = wanted.clamp(max=C).int().t().contiguous()
    is_filled = (torch.arange(C, device=device) < filled[..., None]).flatten(1)
    count = is_filled.sum(1)
    rows, offsets = is_filled.flatten().nonzero().squeeze(1), count.cumsum(0).int()
    owner = torch.repeat_interleave(count)
    counts = count.tolist()

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).div_(shape[-2] ** 0.5).to(size.torch_dtype).requires_grad_()

    x = (torch.randn(E, G * C, D, device=device) * is_filled[..., None]).to(size.torch_dtype).requires_grad_()
    w1, b1, w2, b2 = leaf(E, D, 4 * D), leaf(E, 4 * D), leaf(E, 4 * D, D), leaf(E, D)
    act = partial(F.gelu, approximate="tanh")

    def spread(y: torch.Tensor) -> list[torch.Tensor]:
        return [y.new_zeros(E * G * C, D).index_copy(0, rows, y).view_as(x)]

    def padded():
        hidden = act(torch.baddbmm(b1[:, None], x, w1))
        return [torch.baddbmm(b2[:, None], hidden, w2) * is_filled[..., None]]

    def loop():
        inputs = x.flatten(0, 1)[rows].split(counts)
        # Unbind once: under autograd, every w1[e] would allocate a gradient of the size of w1.
        parameters = zip(inputs, w1.unbind(), b1.unbind(), w2.unbind(), b2.unbind(), strict=True)
        return spread(torch.cat([torch.addmm(d, act(torch.addmm(b, i, a)), c) for i, a, b, c, d in parameters]))

    def grouped():
        hidden = act(F.grouped_mm(x.flatten(0, 1)[rows], w1, offs=offsets) + F.embedding(owner, b1))
        return spread(F.grouped_mm(hidden, w2, offs=offsets) + F.embedding(owner, b2))

    packed = packed_mlps(w1, b1, w2, b2, max(1, len(rows) // E))

    def onednn():
        inputs = x.flatten(0, 1)[rows].split(counts)
        return spread(torch.cat([mlp(i) for mlp, i in zip(packed, inputs, strict=True)]))

    variant = partial(Variant, leaves=(x, w1, b1, w2, b2))
    flops = 2 * 2 * len(rows) * D * 4 * D
    moved = size.itemsize * (2 * len(rows) * D + 8 * E * D * D)
    return Case(
        op="grouped_mlp",
        title="expert MLPs, " + ("one group" if one_group else "per image"),
        size=size,
        variants=(
            variant("ours", "ours", lambda: [mlp_of_slots(x, w1, b1, w2, b2, filled, "gelu_tanh")]),
            variant("torch baddbmm, padded", "index", padded),
            variant("loop over experts", "index", loop),
            variant("grouped_mm", "index", grouped),
            *([Variant("loop over experts, packed for oneDNN", "peer", onednn)] if packed else []),
            dense(x, len(rows)),
        ),
        floors={
            FORWARD: Floor(flops, moved, dtype=size.dtype),
            BACKWARD: Floor(3 * flops, 3 * moved, dtype=size.dtype),
        },
        tolerance=size.tolerance(1e-4),
    )


# 98 * K rows per expert. All variants are measured within a minute.
DEFAULT = Size(images=16)
QUICK = Size(images=4, experts=8, width=192)
NARROW_BFLOAT16 = replace(VIT_B_BFLOAT16, width=384)
entry = partial(Entry, "grouped_mlp", default=DEFAULT, quick=QUICK, weight=6)
ENTRIES = (
    entry(build, cuda=(VIT_B_BFLOAT16, NARROW_BFLOAT16, VIT_B), cuda_quick=(VIT_B_BFLOAT16, NARROW_BFLOAT16)),
    entry(partial(build, one_group=False), cuda=(VIT_B_BFLOAT16, VIT_B)),
)
