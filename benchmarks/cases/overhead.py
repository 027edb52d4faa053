"""Cases of call overhead: ops and layers on input so small that the calls take the time, not the arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.case import BACKWARD, FORWARD, RECORDED, Case, Entry, Floor, Size, Variant
from vmoe_routers import ROUTERS, MoEMlp, ops

TINY = Size(images=1, tokens=4, experts=4, width=8, top_k=1)
TINY_LAYER = Size(images=1, tokens=16, experts=4, width=8, top_k=1)


def calls(size: Size, device: str) -> dict[str, tuple[Callable[[], Sequence[Tensor]], tuple[Tensor, ...]]]:
    """Returns a call of every op on one tiny group, and the tensors whose gradients the call computes."""
    T, E, D = size.tokens, size.experts, size.width
    scores = torch.randn(1, T, E, device=device, requires_grad=True)
    x = torch.randn(1, T, D, device=device, requires_grad=True)
    y = torch.randn(E, 1, 1, D, device=device, requires_grad=True)
    rows = torch.randn(E, 1, D, device=device, requires_grad=True)
    phi = torch.randn(D, E, device=device, requires_grad=True)
    gate = torch.rand(1, E, 1, device=device, requires_grad=True)
    expert = torch.arange(T, dtype=torch.int32, device=device).view(1, T, 1) % E
    chosen = ops.topk(scores, 1)[1]
    w1, b1, w2, b2 = (torch.randn(E, *sizes, device=device, requires_grad=True) for sizes in ((D, D), (D,)) * 2)
    token = ops.assign_slots(expert, E, 1)[1]
    offsets, slots, _ = ops.invert_slots(token, T)
    return {
        "topk": (lambda: ops.topk(scores, 1), (scores,)),
        "softmax_topk": (lambda: ops.softmax_topk(scores, 1), (scores,)),
        "softmax_gather": (lambda: [ops.softmax_gather(scores, chosen)], (scores,)),
        "assign_slots": (lambda: ops.assign_slots(expert, E, 1), ()),
        "invert_slots": (lambda: ops.invert_slots(token, T), ()),
        "dispatch": (lambda: [ops.dispatch(x, token, offsets, slots)], (x,)),
        "combine": (lambda: [ops.combine(y, gate, token, offsets, slots)], (y, gate)),
        "sinkhorn": (lambda: [ops.sinkhorn(scores, iterations=1)], (scores,)),
        "ksparse_projection": (lambda: [ops.ksparse_projection(scores, 1)], (scores,)),
        "ksparse_transport": (lambda: [ops.ksparse_transport(scores, 1, iterations=1)], (scores,)),
        "grouped_mlp": (lambda: [ops.grouped_mlp(rows, w1, b1, w2, b2)], (rows, w1, b1, w2, b2)),
        "soft_logits": (lambda: [ops.soft_logits(x, phi)], (x, phi)),
        "soft_mix": (lambda: [ops.soft_mix(scores, x, 1)], (scores, x)),
    }


def build(size: Size, device: str, *, name: str) -> Case:
    call, leaves = calls(size, device)[name]
    a = torch.randn(1, size.tokens, size.experts, device=device, requires_grad=bool(leaves))
    b = torch.randn(1, size.tokens, size.experts, device=device)
    directions = (FORWARD, RECORDED, BACKWARD) if leaves else (FORWARD,)
    return Case(
        op="overhead",
        title=f"call of {name}, tiny input",
        size=size,
        variants=(
            Variant("ours", "ours", call, leaves=leaves),
            Variant(
                "torch.add", "yardstick", lambda: [torch.add(a, b)], leaves=(a,), different="torch's cheapest call"
            ),
        ),
        floors=dict.fromkeys(directions, Floor(bytes=8 * a.numel())),
    )


def tiny_layers(size: Size, device: str, router: str) -> tuple[MoEMlp, nn.Module, Tensor]:
    """Makes a layer with the router, a dense MLP of the same widths, and tokens."""
    D = size.width
    layer = MoEMlp(D, 2 * D, num_experts=size.experts, router=router).to(device)
    dense = nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)).to(device)
    return layer, dense, torch.randn(size.images, size.tokens, D, device=device, requires_grad=True)


def build_layer(size: Size, device: str, *, router: str) -> Case:
    """Builds the case of a layer in eval mode, in which routing has no noise."""
    layer, dense, x = tiny_layers(size, device, router)
    layer.eval()
    leaves = {module: (x, *module.parameters()) for module in (layer, dense)}
    return Case(
        op="overhead",
        title=f"tiny layer, {router}",
        size=size,
        variants=(
            Variant("ours", "ours", lambda: [layer(x)], leaves[layer]),
            Variant("dense MLP", "yardstick", lambda: [dense(x)], leaves[dense], different="one MLP without a router"),
        ),
        floors=dict.fromkeys((FORWARD, BACKWARD), Floor(bytes=8 * x.numel())),
    )


OPS = tuple(
    Entry("overhead", partial(build, name=name), default=TINY, quick=TINY, cuda=(TINY,)) for name in ops.__all__
)
LAYERS = tuple(
    Entry("overhead", partial(build_layer, router=router), default=TINY_LAYER, quick=TINY_LAYER, cuda=(TINY_LAYER,))
    for router in ROUTERS
)
ENTRIES = (*OPS, *LAYERS)
