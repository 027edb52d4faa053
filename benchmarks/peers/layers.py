"""Our layers in torch code, with the weights of one of our layers and the same results."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import Variant
from benchmarks.peers import forms
from vmoe_routers import MoEMlp, TokenChoiceRouter
from vmoe_routers.routers.affinity import Sinkhorn, Softmax, SparsityConstrained


def dense(x: Tensor, rows: int) -> Variant:
    """Makes an MLP of hidden width 4 D over `rows` rows: the products of the experts without routing."""
    D = x.shape[2]
    first, second = nn.Linear(D, 4 * D).to(x), nn.Linear(4 * D, D).to(x)
    xs = torch.randn(rows, D, device=x.device).to(x.dtype).requires_grad_()
    return Variant(
        "dense MLP, same FLOPs",
        "dense",
        lambda: [second(F.gelu(first(xs), approximate="tanh"))],
        leaves=(xs, *first.parameters(), *second.parameters()),
        different="dense",
    )


def _affinity(affinity: object, logits: Tensor, C: int) -> tuple[Tensor, Tensor]:
    """Returns the gates that select and the gates that weigh."""
    gates = logits.softmax(-1)
    if isinstance(affinity, Softmax):
        return gates.detach(), gates
    with torch.no_grad():
        if isinstance(affinity, Sinkhorn):
            return forms.sinkhorn(logits, affinity.iterations), gates
        assert isinstance(affinity, SparsityConstrained)
        plan = forms.ksparse_transport(gates, C, affinity.iterations, affinity.learning_rate, affinity.tolerance)
        # Among zeros, select the lower index, as our op does: torch.topk promises no order of equal values.
        index = torch.arange(plan.shape[1], device=plan.device, dtype=plan.dtype).view(1, -1, 1)
        return torch.where(plan > 0, plan, -index), gates


def route(layer: MoEMlp, x: Tensor) -> tuple[Tensor, Tensor]:
    """Routes tokens x [G, T, D]. Returns row and gate of every slot [E, G, C]. The row of an empty slot is G * T."""
    router = layer.router
    G, T, _ = x.shape
    logits = F.linear(x.float(), router.weight.float())
    if isinstance(router, TokenChoiceRouter):
        K = router.top_k
        E, C = router.num_experts, router.slots(T)
        choose, gates = _affinity(router.affinity, logits, C)
        expert = choose.topk(K).indices
        kept = gates.gather(2, expert)
        if router.renormalize:
            kept = kept / kept.sum(2, keepdim=True)
        _, source = forms.slots(expert, E, C)
        gate = F.pad(kept.flatten(1), (0, 1)).gather(1, torch.where(source < 0, T * K, source).flatten(1))
        token, gate = source.div(K, rounding_mode="floor"), gate.view(source.shape)
    else:
        C = router.slots(T)
        choose, gates = _affinity(router.affinity, logits, C)
        token = choose.topk(C, dim=1).indices
        gate, token = gates.gather(1, token).transpose(1, 2), token.transpose(1, 2)
    first = torch.arange(G, device=x.device).view(G, 1, 1) * T
    rows = torch.where(token < 0, G * T, first + token)
    return rows.transpose(0, 1), gate.transpose(0, 1)


def mlp(layer: MoEMlp, x: Tensor) -> Tensor:
    """Computes the experts on x [E, N, D] by two batched products."""
    e = layer.experts
    if e.b1 is None or e.b2 is None:
        return torch.bmm(e.act(torch.bmm(x, e.w1)), e.w2)
    return torch.baddbmm(e.b2[:, None], e.act(torch.baddbmm(e.b1[:, None], x, e.w1)), e.w2)


def gather_bmm(layer: MoEMlp, x: Tensor) -> Tensor:
    """Computes the layer by a gather into buffers, batched products and index_add."""
    rows, gate = route(layer, x)
    flat, rows = x.flatten(0, 1), rows.reshape(rows.shape[0], -1)
    y = mlp(layer, forms.gather_rows(flat, rows.flatten()).view(*rows.shape, -1))
    return forms.add_rows(y.flatten(0, 1), gate.reshape(-1), rows.flatten(), flat.shape[0]).view_as(x)


def _linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x @ w if b is None else torch.addmm(b, x, w)


def _unbind(parameter: Tensor | None) -> Iterable[Tensor | None]:
    return itertools.repeat(None) if parameter is None else parameter.unbind()


def mlps(layer: MoEMlp) -> Iterable[Callable[[Tensor], Tensor]]:
    """Yields every expert as a function of its rows.

    Unbinds the weights once: under autograd, every `w1[e]` would allocate a gradient of the size of `w1`.
    """
    e = layer.experts
    for w1, b1, w2, b2 in zip(*(_unbind(p) for p in (e.w1, e.b1, e.w2, e.b2)), strict=False):
        yield lambda x, w1=w1, b1=b1, w2=w2, b2=b2: _linear(e.act(_linear(x, w1, b1)), w2, b2)


def loop(layer: MoEMlp, x: Tensor, experts: Iterable[Callable[[Tensor], Tensor]] | None = None) -> Tensor:
    """Computes the layer by a loop over the experts, as transformers does in eager mode."""
    rows, gate = route(layer, x)
    flat = x.flatten(0, 1)
    n = flat.shape[0]
    out = torch.zeros_like(flat)
    for mine, weight, expert in zip(rows.flatten(1), gate.flatten(1), experts or mlps(layer), strict=True):
        is_kept = (mine < n).nonzero().squeeze(1)
        token = mine[is_kept]
        out = out.index_add_(0, token, expert(flat[token]) * weight[is_kept, None].to(x.dtype))
    return out.view_as(x)


def packed_mlps(w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, rows: int) -> list[Callable[[Tensor], Tensor]]:
    """Makes every expert a function in oneDNN, with weights packed for about `rows` rows.

    torch.compile makes the same calls for frozen weights. The ops of torch are not public and have no gradient.

    Returns:
        A function per expert; an empty list if torch or the device lacks the ops.
    """
    if w1.device.type != "cpu" or w1.dtype != torch.float32 or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return []
    linear = torch.ops.mkldnn._linear_pointwise

    def pack(weights: Tensor) -> list[Tensor]:
        pack_one = torch.ops.mkldnn._reorder_linear_weight
        return [pack_one(w.t().contiguous(), rows) for w in weights.detach()]

    def expert(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return linear(linear(x, w1, b1, "gelu", [], "tanh"), w2, b2, "none", [], "")

    parameters = zip(pack(w1), b1.detach(), pack(w2), b2.detach(), strict=True)
    return [lambda x, mine=mine: expert(x, *mine) for mine in parameters]


def grouped(layer: MoEMlp, x: Tensor) -> Tensor:
    """Computes the layer by torch's grouped_mm over the filled rows, as transformers does."""
    rows, gate = route(layer, x)
    flat, e = x.flatten(0, 1), layer.experts
    n = flat.shape[0]
    is_kept = rows.flatten(1) < n
    count = is_kept.sum(1)
    token, weight = rows.flatten(1)[is_kept], gate.flatten(1)[is_kept]
    offsets = count.cumsum(0).int()
    y = F.grouped_mm(flat[token], e.w1, offs=offsets)
    if e.b1 is None or e.b2 is None:
        y = F.grouped_mm(e.act(y), e.w2, offs=offsets)
    else:
        owner = torch.repeat_interleave(count)
        y = F.grouped_mm(e.act(y + F.embedding(owner, e.b1)), e.w2, offs=offsets) + F.embedding(owner, e.b2)
    return torch.zeros_like(flat).index_add(0, token, y * weight[:, None].to(x.dtype)).view_as(x)


def einsum(layer: MoEMlp, x: Tensor) -> Tensor:
    """Computes the layer with one-hot dispatch and combine tensors [G, T, E, C], as V-MoE and GShard do."""
    rows, gate = route(layer, x)
    G, T, _ = x.shape
    all_rows = torch.arange(G * T, device=x.device).view(G, T, 1, 1)
    one_hot = (rows.transpose(0, 1)[:, None] == all_rows).to(x.dtype)
    inputs = torch.einsum("gtec,gtd->egcd", one_hot, x)
    y = mlp(layer, inputs.flatten(1, 2)).view_as(inputs)
    return torch.einsum("gtec,egcd->gtd", one_hot * gate.transpose(0, 1)[:, None].to(x.dtype), y)


def soft_logits(layer: MoEMlp, x: Tensor) -> Tensor:
    phi = layer.router.scale * F.normalize(layer.router.phi.flatten(1), dim=0)
    return F.normalize(x, dim=-1) @ phi


def soft(layer: MoEMlp, x: Tensor) -> Tensor:
    """Computes Soft MoE with two softmaxes and batched products."""
    logits = soft_logits(layer, x)
    G, E = x.shape[0], layer.router.num_experts
    slots = (logits.softmax(1).transpose(1, 2) @ x).view(G, E, -1, x.shape[2])
    y = mlp(layer, slots.transpose(0, 1).flatten(1, 2)).view(E, G, -1, x.shape[2]).transpose(0, 1)
    return logits.softmax(2) @ y.flatten(1, 2)


def soft_einsum(layer: MoEMlp, x: Tensor) -> Tensor:
    """Computes Soft MoE as bwconrad's soft-moe does: einsum over [b, m, n, p] and a list of experts."""
    router, e = layer.router, layer.experts
    phi = router.scale * F.normalize(router.phi, dim=0)
    logits = torch.einsum("bmd,dnp->bmnp", F.normalize(x, dim=2), phi)
    slots = torch.einsum("bmd,bmnp->bnpd", x, logits.softmax(1))
    parameters = zip(e.w1.unbind(), e.b1.unbind(), e.w2.unbind(), e.b2.unbind(), strict=True)
    ys = [e.act(slots[:, i] @ w1 + b1) @ w2 + b2 for i, (w1, b1, w2, b2) in enumerate(parameters)]
    combine = logits.flatten(2).softmax(2).view_as(logits)
    return torch.einsum("bnpd,bmnp->bmd", torch.stack(ys, 1), combine)
