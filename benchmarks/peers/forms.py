"""Our ops in torch code: naive forms (one-hot, log domain) and well-written index forms.

A function computes the same results as the op of its name. torch.compile is applied to index forms. Routing is in
float32 for 16-bit inputs, too.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def topk_one_hot(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Takes the argmax k times, and masks the taken entry each time, as early MoE code does."""
    gates = softmax(logits)
    left, values, indices = gates, [], []
    for _ in range(k):
        index = left.argmax(-1)
        chosen = F.one_hot(index, gates.shape[-1]).to(gates.dtype)
        values.append((gates * chosen).sum(-1))
        indices.append(index)
        left = left * (1 - chosen)
    return torch.stack(values, -1).to(logits.dtype), torch.stack(indices, -1)


def softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1, dtype=torch.float32)


def topk(logits: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    values, indices = softmax(logits).topk(k, dim)
    return values.to(logits.dtype), indices


def topk_then_normalize(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Computes the softmax of the chosen entries alone, without a tensor of probabilities [n, E]."""
    best, index = logits.topk(k)
    return (best - logits.float().logsumexp(-1, keepdim=True)).exp().to(logits.dtype), index


def slots_one_hot(expert: Tensor, E: int, C: int, priority: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finds positions in the buffers by a cumulative sum of one-hot requests [G, K * T, E]."""
    G, T, K = expert.shape
    served, order = _in_order(expert, priority)
    one_hot = F.one_hot(served, E)
    position = ((one_hot.cumsum(1) - 1) * one_hot).sum(-1)
    return _write_slots(served, position, order, (G, T, K, E, C))


def slots(expert: Tensor, E: int, C: int, priority: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Finds positions in the buffers by one stable sort of the requests by expert."""
    G, T, K = expert.shape
    served, order = _in_order(expert, priority)
    by_expert, request = served.sort(dim=1, stable=True)
    count = torch.zeros(G, E, dtype=torch.long, device=expert.device).scatter_add_(1, served, torch.ones_like(served))
    start = count.cumsum(1) - count
    rank = torch.arange(K * T, device=expert.device) - start.gather(1, by_expert)
    position = torch.empty_like(rank).scatter_(1, request, rank)
    return _write_slots(served, position, order, (G, T, K, E, C))


def _in_order(expert: Tensor, priority: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the experts of all requests [G, K * T] in the order in which requests are served, and their tokens."""
    G, T, K = expert.shape
    if priority is None:
        return expert.long().transpose(1, 2).reshape(G, K * T), torch.arange(T, device=expert.device).expand(G, T)
    order = priority.argsort(dim=1, descending=True, stable=True)
    return expert.long().gather(1, order[..., None].expand(G, T, K)).transpose(1, 2).reshape(G, K * T), order


def _write_slots(served: Tensor, position: Tensor, order: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    G, T, K, E, C = shape
    request = (order[:, None] * K + torch.arange(K, device=order.device)[:, None]).reshape(G, K * T)
    kept = position < C
    place = torch.where(kept, served * C + position, -1)
    slot = torch.empty_like(place).scatter_(1, request, place).view(G, T, K)
    source = torch.full((G, E * C + 1), -1, device=order.device)
    source.scatter_(1, torch.where(kept, place, E * C), request)
    return slot, source[:, : E * C].view(G, E, C)


def invert_slots_mask(token: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Finds the slots of every token by a mask [G, T, S] of the token in every slot."""
    G, S = token.shape[0], token[0].numel()
    is_source = token.view(G, 1, S) == torch.arange(T, device=token.device).view(T, 1)
    group, _, slot = is_source.nonzero().unbind(1)
    return _by_token(is_source.sum(2), group, slot, S)


def invert_slots(token: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Finds the slots of every token by one stable sort of the slots by token, with empty slots last."""
    G, S = token.shape[0], token[0].numel()
    owner = torch.where((token < 0) | (token >= T), T, token).view(G, S)
    ordered, slot = owner.sort(dim=1, stable=True)
    every = torch.arange(T + 1, device=token.device, dtype=ordered.dtype).expand(G, T + 1).contiguous()
    return torch.searchsorted(ordered, every, out_int32=True), torch.where(ordered < T, slot, -1).int()


def _by_token(count: Tensor, group: Tensor, slot: Tensor, S: int) -> tuple[Tensor, Tensor]:
    offsets = F.pad(count.cumsum(1), (1, 0))
    first = F.pad(offsets[:-1, -1].cumsum(0), (1, 0))
    slots = torch.full((count.shape[0], S), -1, device=count.device)
    slots[group, torch.arange(group.numel(), device=count.device) - first[group]] = slot
    return offsets.int(), slots.int()


def sinkhorn_log(logits: Tensor, iterations: int = 20) -> Tensor:
    """Runs Sinkhorn in the log domain: two logsumexp per iteration."""
    n, E = logits.shape[1:]
    f = logits.new_zeros(logits.shape[0], n, 1)
    h = f
    target = math.log(n / E)
    for _ in range(iterations):
        h = target - (logits + f).logsumexp(1, keepdim=True)
        f = -(logits + h).logsumexp(2, keepdim=True)
    return (logits + f + h).exp()


def sinkhorn(logits: Tensor, iterations: int = 20) -> Tensor:
    """Runs Sinkhorn on scaling vectors: one exp in all, and two matrix-vector products per iteration."""
    n, E = logits.shape[1:]
    # A shift of the rows leaves the plan unchanged and scales u. Start from the u of the unshifted logits.
    shift = logits.detach().amax(2, keepdim=True)
    K = (logits - shift).exp()
    u = shift.exp().transpose(1, 2)  # [G, 1, n]
    v = u
    for _ in range(iterations):
        v = (n / E) / (u @ K)  # [G, 1, E]
        u = 1 / (K @ v.transpose(1, 2)).transpose(1, 2)
    return u.transpose(1, 2) * K * v


def sinkhorn_megatron(logits: Tensor, iterations: int = 20) -> Tensor:
    """Runs the loop of Megatron-LM's router, with a fixed number of iterations instead of a tolerance."""
    cost = logits[0].exp()
    d0, d1 = torch.ones_like(cost[:, 0]), torch.ones_like(cost[0])
    for _ in range(iterations):
        d0 = (1 / d0.size(0)) * 1 / (torch.sum(d1 * cost, 1) + 1e-8)
        d1 = (1 / d1.size(0)) * 1 / (torch.sum(d0.unsqueeze(1) * cost, 0) + 1e-8)
    return (d1 * cost * d0.unsqueeze(1))[None]


def ksparse_projection(x: Tensor, k: int) -> Tensor:
    """Projects the k largest entries of the last axis onto the simplex. All other entries become 0."""
    best, index = x.topk(k)
    total = best.cumsum(-1)
    r = torch.arange(1, k + 1, device=x.device, dtype=x.dtype)
    rho = (1 + r * best > total).sum(-1, keepdim=True).clamp(min=1)
    tau = (total.gather(-1, rho - 1) - 1) / rho
    return torch.zeros_like(x).scatter(-1, index, (best - tau).relu())


def ksparse_plan(alpha: Tensor, S: Tensor, k: int, b: float) -> Tensor:
    """Computes b P_k((alpha + S) / b) of every column, with P_k the projection."""
    return b * ksparse_projection(((alpha[..., None] + S) / b).transpose(1, 2), k).transpose(1, 2)


def ksparse_transport(
    S: Tensor, k: int, iterations: int = 20, learning_rate: float = 0.01, tolerance: float = 1e-3
) -> Tensor:
    """Runs Adam on the semi-dual of all groups, one batched top-k per iteration. Backward uses the last projection."""
    b = S.shape[1] / S.shape[2]
    with torch.no_grad():
        alpha = torch.zeros_like(S[..., 0])
        m, v = torch.zeros_like(alpha), torch.zeros_like(alpha)
        running = torch.ones_like(alpha[:, :1], dtype=torch.bool)
        for i in range(1, iterations + 1):
            gradient = 1 - ksparse_plan(alpha, S, k, b).sum(2)
            m = 0.9 * m + 0.1 * gradient
            v = 0.999 * v + 0.001 * gradient.square()
            update = learning_rate * (m / (1 - 0.9**i)) / ((v / (1 - 0.999**i)).sqrt() + 1e-8)
            alpha = torch.where(running, alpha + update, alpha)
            running = running & ~(gradient.norm(dim=1, keepdim=True) <= tolerance)
    return ksparse_plan(alpha, S, k, b)


def gather_rows(x: Tensor, token: Tensor) -> Tensor:
    """Gathers a row of x [n, D] per slot. `token` [S] is n for an empty slot."""
    return F.pad(x, (0, 0, 0, 1)).index_select(0, token)


def add_rows(y: Tensor, gate: Tensor, token: Tensor, n: int) -> Tensor:
    """Weights the rows of y [S, D] by their gates and adds them to their tokens."""
    return y.new_zeros(n + 1, y.shape[1]).index_add(0, token, y * gate[:, None].to(y.dtype))[:n]


def sum_slots(y: Tensor, gate: Tensor, slot: Tensor) -> Tensor:
    """Sums the weighted rows of every token's slots, slot [n, K] with -1 for dropped requests, without index_add."""
    is_kept = slot >= 0
    where = slot.clamp(min=0)
    weight = (gate[where] * is_kept).to(y.dtype)
    return (y.index_select(0, where.flatten()).view(*slot.shape, -1) * weight[..., None]).sum(1)


def soft_logits(x: Tensor, phi: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) @ phi


def soft_mix(x: Tensor, phi: Tensor) -> Tensor:
    """Computes dispatch and combine of Soft MoE without experts: two softmaxes, two batched products."""
    logits = soft_logits(x, phi)
    slots = logits.softmax(1).transpose(1, 2) @ x
    return logits.softmax(2) @ slots


def soft_mix_one_exp(x: Tensor, phi: Tensor) -> Tensor:
    """Computes one exp for both softmaxes, and divides the outputs by the sums."""
    logits = soft_logits(x, phi)
    e = (logits - logits.detach().amax((1, 2), keepdim=True)).exp()
    slots = (e.transpose(1, 2) @ x) / e.sum(1)[..., None]
    return (e @ slots) / e.sum(2, keepdim=True)


def soft_mix_attention(x: Tensor, phi: Tensor) -> Tensor:
    """Runs two attentions: slots attend to tokens, then tokens to slots. No logits are stored."""
    tokens, slots = F.normalize(x, dim=-1)[:, None], phi.t().expand(x.shape[0], 1, -1, -1)
    mixed = F.scaled_dot_product_attention(slots, tokens, x[:, None], scale=1.0)
    return F.scaled_dot_product_attention(tokens, slots, mixed, scale=1.0)[:, 0]


def soft_mix_einsum(x: Tensor, phi: Tensor, E: int) -> Tensor:
    """Computes einsums over [g, t, e, c] tensors, as the packages do."""
    logits = torch.einsum("gtd,dec->gtec", F.normalize(x, dim=-1), phi.unflatten(1, (E, -1)))
    slots = torch.einsum("gtd,gtec->gecd", x, logits.softmax(1))
    combine = logits.flatten(2).softmax(-1).view_as(logits)
    return torch.einsum("gecd,gtec->gtd", slots, combine)
