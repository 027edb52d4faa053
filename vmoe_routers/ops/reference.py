"""Definitions of all ops in plain differentiable PyTorch, which the tests compare the kernels with.

The functions have the names, arguments and results of the ops, ties and edge cases included. One function differs:
`grouped_mlp` takes the activation as a function, and computes all rows. The functions run on any device, and autograd
derives their gradients. They are written for reading, not for speed: one-hot requests, full sorts, loops over groups.
They do not check arguments. No op falls back to these functions. `vmoe_routers.decompositions` puts them into exported
programs.

Letters: ``G`` groups, ``T`` tokens of a group, ``D`` width, ``E`` experts, ``K`` experts per token, ``C`` capacity,
``S = E * C`` slots. bfloat16 and float16 are computed in float32 and returned in their own dtype; `soft_logits` returns
float32. -inf marks a masked entry. NaN counts as the largest value, as in ``torch.sort``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

INF = float("inf")
GELU_TANH = partial(F.gelu, approximate="tanh")


def topk(x: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """Selects the `k` largest entries along `dim`, in descending order, ties by the lower index. The axis goes last."""
    x = x.movedim(dim, -1)
    indices = x.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return x.gather(-1, indices), indices.int()


def softmax_gather(logits: Tensor, indices: Tensor, dim: int = 2) -> Tensor:
    """Gathers softmax(logits, -1) at `indices`: experts [G, T, K] (dim 2) or tokens [G, E, C] (dim 1).

    An index out of range, or a token whose logits are all -inf, gives 0.
    """
    gates = _gates(logits).movedim(dim, -1)
    valid = (indices >= 0) & (indices < gates.shape[2])
    gates = F.pad(gates, (0, 1))  # the zero that an invalid index reads
    return gates.gather(2, torch.where(valid, indices, gates.shape[2] - 1).long()).to(logits.dtype)


def softmax_topk(logits: Tensor, k: int, dim: int = 2, *, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Selects the `k` largest entries of softmax(logits, -1) for every token (dim 2) or expert (dim 1).

    A token whose logits are all -inf is masked: its entries have value 0 and index -1.
    """
    masked = _masked(_wide(logits), mask)
    gates = _gates(masked).masked_fill(~_present(masked)[..., None], -INF)
    values, indices = topk(gates, k, dim)
    absent = values == -INF
    return values.masked_fill(absent, 0).to(logits.dtype), indices.masked_fill(absent, -1)


def assign_slots(
    expert: Tensor, num_experts: int, capacity: int, priority: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Fills the experts' buffers with the tokens' requests (V-MoE, arXiv 2106.05974, algorithms 1 and 2).

    First choices of all tokens are served before second choices. Within a choice, tokens are served in index order, or
    by descending `priority` (stable). A request for a full buffer is dropped: slot -1.
    """
    G, T, K = expert.shape
    E, C = num_experts, capacity
    order = torch.arange(T, device=expert.device).expand(G, T)
    if priority is not None:
        order = priority.detach().sort(dim=1, descending=True, stable=True).indices
    # Experts of the requests in the order of service, [G, K * T], and the requests as t * K + k.
    served = expert.long().gather(1, order[..., None].expand(G, T, K)).transpose(1, 2).reshape(G, K * T)
    request = (order[:, None] * K + torch.arange(K, device=expert.device)[:, None]).reshape(G, K * T)

    one_hot = served[..., None] == torch.arange(E, device=expert.device)  # [G, K * T, E]; -1 matches no expert
    position = ((one_hot.long().cumsum(1) - 1) * one_hot).sum(-1)
    kept = one_hot.any(-1) & (position < C)
    slot_served = torch.where(kept, served * C + position, -1)

    slot = torch.empty_like(slot_served).scatter(1, request, slot_served).view(G, T, K)
    source = expert.new_full((G, E * C + 1), -1, dtype=torch.long)  # the last place takes dropped requests
    source = source.scatter(1, torch.where(kept, slot_served, E * C), request)
    return slot.int(), source[:, : E * C].reshape(G, E, C).int()


def invert_slots(token: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lists the slots of every token in CSR form: slots[offsets[t] : offsets[t + 1]] for token t, ascending.

    `filled` is the position after the last filled slot of every expert, or 0.
    """
    row = _row(token, num_tokens)
    ordered, slots = row.sort(dim=1, stable=True)  # empty slots last
    count = row.new_zeros(row.shape[0], num_tokens + 1).scatter_add(1, row, torch.ones_like(row))
    offsets = F.pad(count[:, :num_tokens].cumsum(1), (1, 0))
    position = torch.arange(1, token.shape[2] + 1, device=token.device)
    filled = F.pad((row.view(token.shape) < num_tokens) * position, (1, 0)).amax(-1)  # 0 if C is 0
    return offsets.int(), torch.where(ordered < num_tokens, slots, -1).int(), filled.int()


def dispatch(x: Tensor, token: Tensor, offsets: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
    """Copies the token of every slot: out[e, g, c] = x[g, token[g, e, c]], zeros in an empty slot.

    `offsets` and `slots` are not used. Only the gradient of the op needs them.
    """
    G, E, C = token.shape
    row = _row(token, x.shape[1])[..., None].expand(-1, -1, x.shape[2])
    padded = F.pad(_wide(x), (0, 0, 0, 1))  # [G, T + 1, D]: empty slots read the last row
    return padded.gather(1, row).view(G, E, C, x.shape[2]).transpose(0, 1).to(x.dtype)


def combine(y: Tensor, gate: Tensor | None, token: Tensor, offsets: Tensor, slots: Tensor | None = None) -> Tensor:
    """Sums the slots of every token: out[g, t] = sum of gate[g, e, c] y[e, g, c]. With `gate` None, all gates are 1."""
    (G, E, C), T, D = token.shape, offsets.shape[1] - 1, y.shape[3]
    row = _row(token, T)[..., None]
    empty = (row == T).view(G, E, C, 1)
    weighted = _wide(y).transpose(0, 1).masked_fill(empty, 0)
    if gate is not None:
        weighted = weighted * gate.to(weighted.dtype)[..., None].masked_fill(empty, 0)
    out = weighted.new_zeros(G, T + 1, D).scatter_add(1, row.expand(-1, -1, D), weighted.reshape(G, E * C, D))
    return out[:, :T].to(y.dtype)


def sinkhorn(
    logits: Tensor,
    *,
    epsilon: float = 1.0,
    iterations: int = 20,
    tolerance: float | None = None,
    mask: Tensor | None = None,
    gradient: str = "unrolled",
    return_error: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Computes the entropic plan with row sums 1. Column sums converge to n / E (Cuturi, arXiv 1306.0895).

        h_e = log(n / E) - logsumexp_t(M[t, e] + f_t)
        f_t =            - logsumexp_e(M[t, e] + h_e)
        T   = exp(M + f + h)

    M = logits / epsilon, f starts at 0, and n is the number of present tokens. A column of -inf gives a column of
    zeros. The gradient is computed through the iterations, or at the fixed point with ``gradient="implicit"``.
    """
    M = _masked(_wide(logits), mask) / epsilon
    E = M.shape[2]
    n = _present(M).sum(1)[:, None, None].to(M.dtype)  # [G, 1, 1]
    f = M.new_zeros(M.shape[0], M.shape[1], 1)
    h = M.new_zeros(M.shape[0], 1, E)
    error = M.new_full((M.shape[0],), INF)
    steps = torch.zeros_like(error, dtype=torch.int32)
    running = torch.ones_like(error, dtype=torch.bool)
    for _ in range(iterations):
        # A converged group keeps its f and h.
        go = running[:, None, None]
        h = torch.where(go, (n / E).log() - _logsumexp(M + f, 1), h)
        f = torch.where(go, -_logsumexp(M + h, 2), f)
        columns = (M + f + h).exp().sum(1, keepdim=True).detach()
        error = ((columns - n / E).abs() / (n / E).clamp(min=1 / E)).amax((1, 2))
        steps = steps + running.int()
        if tolerance is not None:
            running = running & ~(error <= tolerance)
    plan = (M + f + h).exp()
    if gradient == "implicit":
        plan = _implicit(M, (f + h).detach())
    plan = torch.where(_sound(M), plan, torch.nan).to(logits.dtype)
    return (plan, error, steps) if return_error else plan


def _implicit(M: Tensor, potentials: Tensor) -> Tensor:
    """Gives the plan, with the gradient of exp(M + f(M) + h(M)) at constant row and column sums.

    J = [[diag(rows), T], [T', diag(columns)]] is the derivative of the marginals with respect to (f, h). By the
    implicit function theorem, the Newton step -J^+ (marginals(M) - marginals) has the value 0 and the derivative of
    (f, h). J is singular along (1, -1), a direction that does not change the plan, so its pseudo-inverse is used.
    Only first derivatives are right.
    """
    T = M.shape[1]
    plan = (M + potentials).exp()
    marginals = torch.cat([plan.sum(2), plan.sum(1)], 1)
    with torch.no_grad():
        J = torch.diag_embed(marginals)
        J[:, :T, T:] = plan
        J[:, T:, :T] = plan.transpose(1, 2)
        inverse = torch.linalg.pinv(J.double(), hermitian=True).to(J.dtype)
    step = -torch.einsum("gij,gj->gi", inverse, marginals - marginals.detach())
    return plan * (step[:, :T, None] + step[:, None, T:]).exp()


def ksparse_projection(x: Tensor, k: int) -> Tensor:
    """Finds the nearest point of the probability simplex with at most `k` non-zeros, along the last axis.

    For the k largest entries u_1 >= ... >= u_k: rho = max{r : 1 + r u_r > sum_{i<=r} u_i},
    tau = (sum_{i<=rho} u_i - 1) / rho, p_i = max(u_i - tau, 0); every other entry is 0
    (Kyrillidis et al., arXiv 1206.1529). The gradient on the support is g - mean(g). An entry of -inf gets 0. A row
    with NaN or +inf, or of -inf only, has no projection and gets NaN.
    """
    wide = _wide(x)
    u, indices = topk(wide - wide.detach().amax(-1, keepdim=True), k)  # a shift does not change the projection
    tau = simplex_threshold(u)
    p = torch.zeros_like(wide).scatter(-1, indices.long(), (u - tau).relu())
    return torch.where(tau.isfinite(), p, torch.nan).to(x.dtype)


def simplex_threshold(u: Tensor) -> Tensor:
    """Computes tau of `ksparse_projection`, [..., 1], for u in descending order."""
    total = u.cumsum(-1)
    r = torch.arange(1, u.shape[-1] + 1, device=u.device, dtype=u.dtype)
    rho = (1 + r * u > total).sum(-1, keepdim=True).clamp(min=1)
    return (total.gather(-1, rho - 1) - 1) / rho


def ksparse_transport(
    similarity: Tensor,
    k: int,
    *,
    iterations: int = 20,
    solver: str = "adam",
    learning_rate: float = 0.01,
    tolerance: float = 1e-3,
    gamma: float = 1.0,
    mask: Tensor | None = None,
    project: Callable[[Tensor, int], Tensor] = ksparse_projection,
) -> Tensor:
    """Computes the plan with at most `k` non-zeros per column (Liu et al., arXiv 2209.15466, section 4).

    T[:, e] = b_e P_k((alpha + S[:, e]) / (gamma b_e)), b_e = n / E, with alpha from at most `iterations` steps on the
    semi-dual. No gradient flows through alpha. ``solver="adam"`` follows the op step by step. ``solver="lbfgs"`` finds
    the optimum, and ignores `iterations` and `tolerance`: for k = T the semi-dual is smooth and the solver reaches the
    optimum. For k < T it may stop at a kink, and its value is a lower bound. `project` implements P_k.
    """
    S = _masked(_wide(similarity), mask)
    with torch.no_grad():
        if solver == "adam":
            alpha = _adam(S, k, gamma, iterations, learning_rate, tolerance, project)
        else:
            alpha = torch.stack([_lbfgs(group, k, gamma) for group in S]) if len(S) else S.sum(2)
    plan = ksparse_semi_dual(alpha, S, k, gamma, project)[2]
    return torch.where(_sound(S), plan, torch.nan).to(similarity.dtype)


def ksparse_semi_dual(
    alpha: Tensor,
    S: Tensor,
    k: int,
    gamma: float = 1.0,
    project: Callable[[Tensor, int], Tensor] = ksparse_projection,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes value [G], gradient [G, T] and plan [G, T, E] of the concave semi-dual at alpha [G, T].

    <alpha, a> - sum_e b_e max_{p in simplex, |p|_0 <= k} <alpha + S[:, e], p> - gamma b_e/2 |p|^2

    with a = 1 (0 for masked tokens) and b_e = n / E.
    """
    a = _present(S).to(S.dtype)
    b = a.sum(1)[:, None, None] / S.shape[2]  # [G, 1, 1], equal for all experts
    score = alpha[..., None] + S
    scale = gamma * b.clamp(min=1 / S.shape[2])  # a group without tokens gets zeros below
    P = project((score / scale).transpose(1, 2), k).transpose(1, 2)
    closed = (S == -INF).all(1, keepdim=True)  # experts that no token may take
    plan = (b * P).masked_fill(closed | (b == 0), 0)
    linear = (score.masked_fill(plan == 0, 0) * plan).sum((1, 2))
    value = (alpha * a).sum(1) - linear + gamma / 2 * plan.square().sum((1, 2))
    return value, a - plan.sum(2), plan


def _adam(
    S: Tensor,
    k: int,
    gamma: float,
    iterations: int,
    learning_rate: float,
    tolerance: float,
    project: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """Computes alpha by Adam's ascent from 0. A group stops after an update with |gradient| <= tolerance."""
    alpha = torch.zeros_like(S[..., 0])
    m, v = torch.zeros_like(alpha), torch.zeros_like(alpha)
    running = torch.ones_like(alpha[:, :1], dtype=torch.bool)
    for i in range(1, iterations + 1):
        gradient = ksparse_semi_dual(alpha, S, k, gamma, project)[1]
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient.square()
        update = learning_rate * (m / (1 - 0.9**i)) / ((v / (1 - 0.999**i)).sqrt() + 1e-8)
        alpha = torch.where(running, alpha + update, alpha)
        running = running & ~(gradient.norm(dim=1, keepdim=True) <= tolerance)
    return alpha


def _lbfgs(S: Tensor, k: int, gamma: float) -> Tensor:
    """Computes alpha [T] at the optimum of the semi-dual of one group, by torch's L-BFGS in float64."""
    S = S.double()[None]
    alpha = torch.zeros_like(S[..., 0], requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [alpha],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value, gradient, _ = ksparse_semi_dual(alpha.detach(), S, k, gamma)
        alpha.grad = -gradient
        return -value.sum()

    optimizer.step(closure)
    return alpha.detach()[0]


def soft_logits(x: Tensor, phi: Tensor) -> Tensor:
    """Computes <x / |x|, phi> (arXiv 2308.00951, section 2.3), [G, T, D] and [D, S] -> [G, T, S]."""
    wide = _wide(x)
    # Squares of entries may overflow. The largest entry of a token, at least 1, also if the width is 0:
    largest = F.pad(wide.detach().abs(), (0, 1), value=1.0).amax(2, keepdim=True)
    largest = largest.masked_fill(largest.isinf(), 1.0)  # an infinite entry makes no other entry NaN
    wide = wide / largest
    unit = wide * (wide.square().sum(2, keepdim=True) + 1e-6 / largest / largest).rsqrt()
    return torch.einsum("gtd,ds->gts", unit, _wide(phi))


def soft_mix(logits: Tensor, values: Tensor, dim: int, num_experts: int = 1) -> Tensor:
    """Multiplies a softmax of the logits by the values (Soft MoE, arXiv 2308.00951, equations 1 to 3).

    `dim` 1: softmax over the tokens, values [G, T, D] -> [E, G, C, D]. `dim` 2: softmax over the slots, values
    [E, G, C, D] -> [G, T, D]. A slot or token whose logits are all -inf gets zeros.
    """
    if dim == 2:
        values = values.transpose(0, 1).flatten(1, 2)  # [G, S, D]
    wide, mixed = _wide(logits), _wide(values)
    absent = (wide == -INF).all(dim, keepdim=True)
    weights = wide.masked_fill(absent, 0).softmax(dim).masked_fill(absent, 0)
    dtype = torch.promote_types(weights.dtype, mixed.dtype)
    formula = "gts,gtd->gsd" if dim == 1 else "gts,gsd->gtd"
    out = torch.einsum(formula, weights.to(dtype), mixed.to(dtype)).to(values.dtype)
    if dim == 2:
        return out
    return out.unflatten(1, (num_experts, logits.shape[2] // num_experts)).transpose(0, 1)


def grouped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Callable[[Tensor], Tensor] = GELU_TANH,
) -> Tensor:
    """Computes act(x w1 + b1) w2 + b2, one two-layer MLP per expert, by default with GELU in its tanh form."""
    hidden = torch.einsum("end,edf->enf", _wide(x), _wide(w1))
    if b1 is not None:
        hidden = hidden + _wide(b1)[:, None]
    out = torch.einsum("enf,efd->end", act(hidden), _wide(w2))
    if b2 is not None:
        out = out + _wide(b2)[:, None]
    return out.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """Converts to the dtype of the computation: float64 stays, every other dtype becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x.masked_fill(~mask[..., None], -INF)


def _present(x: Tensor) -> Tensor:
    """Marks the present tokens, [G, T]: their rows [E] are not all -inf."""
    return ~(x == -INF).all(2)


def _sound(x: Tensor) -> Tensor:
    """Marks the groups without NaN and +inf, [G, 1, 1]. The plans of all other groups are NaN."""
    return (x < INF).all(2).all(1)[:, None, None]


def _gates(logits: Tensor) -> Tensor:
    """Computes the softmax over the experts. A masked token gets zeros."""
    wide = _wide(logits)
    absent = ~_present(wide)[..., None]
    return wide.masked_fill(absent, 0).softmax(-1).masked_fill(absent, 0)


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """Computes logsumexp, but gives 0 with gradient 0 where all entries are -inf."""
    nothing = (x == -INF).all(dim, keepdim=True)
    if x.shape[dim] == 0:
        return x.sum(dim, keepdim=True)
    return x.masked_fill(nothing, 0).logsumexp(dim, keepdim=True).masked_fill(nothing, 0)


def _row(token: Tensor, num_tokens: int) -> Tensor:
    """Gives the token of every slot, [G, E * C], and `num_tokens` for an empty slot."""
    filled = (token >= 0) & (token < num_tokens)
    return torch.where(filled, token, num_tokens).long().flatten(1)
