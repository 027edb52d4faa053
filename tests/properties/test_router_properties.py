"""Choices, routers and MoE layers against dense tensors that plain PyTorch makes."""

from __future__ import annotations

import math

import pytest
import torch
from comparing import close, identical
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DTYPES, GROUPS, INF, TOKENS, masks, sizes, tensors

import vmoe_routers as vr
from vmoe_routers.ops import reference

EXPERTS = st.sampled_from((4, 1, 2, 3, 8, 17))
CASES = [(name, {}) for name in vr.ROUTERS] + [
    (name, {"combine": "plan"}) for name in vr.ROUTERS if name.startswith(("sinkhorn", "sparsity"))
]
each_router = pytest.mark.parametrize(("name", "fixed"), CASES)


def dense(source: torch.Tensor, weights: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes dispatch and combine tensor [G, T, E, C] from every slot's token [G, E, C] (-1: empty) and weight."""
    dispatch = (source[:, None] == torch.arange(tokens)[None, :, None, None]).to(weights.dtype)
    return dispatch, torch.where(dispatch == 0, 0, weights[:, None])


def token_choice(gates, weights, k, capacity, batch_priority, renormalize):
    """Computes `vr.token_choice` by its definition."""
    (G, T, E), chosen = gates.shape, reference.topk(gates, k)
    absent = chosen[0] == -INF
    expert = chosen[1].masked_fill(absent, -1)
    priority = chosen[0].masked_fill(absent, 0)[..., 0] if batch_priority else None
    _slot, source = reference.assign_slots(expert, E, capacity, priority)
    kept = weights.gather(2, expert.clamp(min=0).long()).masked_fill(absent, 0)
    kept = kept.masked_fill(chosen[0].isnan(), math.nan)
    if renormalize:
        kept = kept / kept.sum(2, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
    weight = torch.cat([kept.flatten(1), kept.new_zeros(G, 1)], 1)
    weight = weight.gather(1, torch.where(source < 0, T * k, source).flatten(1).long()).view(source.shape)
    return dense(torch.where(source < 0, -1, source // k), weight, T)


def expert_choice(gates, weights, capacity, renormalize):
    """Computes `vr.expert_choice` by its definition."""
    (_G, T, _E), (values, token) = gates.shape, reference.topk(gates, capacity, 1)
    token = token.masked_fill(values == -INF, -1)
    kept = weights.transpose(1, 2).gather(2, token.clamp(min=0).long()).masked_fill(token < 0, 0)
    dispatch, combine = dense(token, kept.masked_fill(values.isnan(), math.nan), T)
    if renormalize:
        combine = combine / combine.sum((2, 3), keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
    return dispatch, torch.where(dispatch == 0, 0, combine)


@st.composite
def choices(draw):
    """Draws gates, other weights or None, a mask, and the masked gates."""
    groups, tokens, experts = draw(GROUPS), draw(TOKENS), draw(EXPERTS)
    dtype = draw(st.sampled_from(DTYPES[:2]))
    gates = draw(tensors(groups, tokens, experts, dtype=dtype))
    weights = draw(st.one_of(st.none(), tensors(groups, tokens, experts, dtype=dtype)))
    mask = draw(masks(groups, tokens))
    return gates, weights, mask, gates if mask is None else gates.masked_fill(~mask[..., None], -INF)


@given(st.data())
def test_token_choice(data):
    gates, weights, mask, masked = data.draw(choices())
    k = data.draw(sizes(gates.shape[2]))
    capacity = data.draw(st.sampled_from((1, 2, 3, gates.shape[1] + 1)))
    priority, renormalize = data.draw(st.booleans()), data.draw(st.booleans())
    options = {"batch_priority": priority, "renormalize": renormalize, "mask": mask}
    routing = vr.token_choice(gates, k, capacity, weights=weights, **options)
    wanted = token_choice(masked, gates if weights is None else weights, k, capacity, priority, renormalize)
    identical(routing.dispatch_tensor(), wanted[0])
    identical(routing.combine_tensor().nan_to_num(7), wanted[1].nan_to_num(7))


@given(st.data())
def test_expert_choice(data):
    gates, weights, mask, masked = data.draw(choices())
    capacity = data.draw(st.sampled_from((1, 2, 3, gates.shape[1] + 1)))
    renormalize = data.draw(st.booleans())
    routing = vr.expert_choice(gates, capacity, weights=weights, renormalize=renormalize, mask=mask)
    capacity = min(capacity, gates.shape[1])
    wanted = expert_choice(masked, gates if weights is None else weights, capacity, renormalize)
    identical(routing.dispatch_tensor(), wanted[0])
    combine = routing.combine_tensor()
    usable = wanted[1].isfinite() & (wanted[1].abs() < 1e30)
    if not renormalize:
        identical(combine.nan_to_num(7), wanted[1].nan_to_num(7))
    elif weights is None and (gates >= 0).all():  # otherwise the sum may cancel
        close(combine[usable], wanted[1][usable].double())


def gates_of(router, name, fixed, logits, mask, capacity):
    """Returns the gates that select and the gates that weigh, by the reference."""
    logits = logits if mask is None else logits.masked_fill(~mask[..., None], -INF)
    softmax = reference._gates(logits)
    if name.startswith("softmax"):
        return softmax, softmax
    if name.startswith("sinkhorn"):
        plan = reference.sinkhorn(logits, mask=mask)
    else:
        plan = reference.ksparse_transport(softmax, capacity, mask=mask)
    return plan, plan if fixed else softmax


@each_router
@given(data=st.data())
def test_router(name, fixed, data):
    groups, tokens, experts = data.draw(GROUPS), data.draw(TOKENS.filter(bool)), data.draw(EXPERTS)
    options = {**fixed, "renormalize": data.draw(st.booleans())} if name != "soft" else {}
    if name.endswith("token_choice"):
        options |= {"top_k": data.draw(sizes(experts)), "batch_priority": data.draw(st.booleans())}
    if name != "soft":
        options["capacity_factor"] = data.draw(st.sampled_from((1.0, 0.1, 10.0)))
    router = vr.create_router(name, 5, experts, **options).double().eval()
    x = data.draw(tensors(groups, tokens, 5, finite=True, moderate=True))
    mask = data.draw(masks(groups, tokens))
    routing = router(x, mask)
    if name == "soft":
        unit = router.phi * (router.phi.square().sum(0) + 1e-6).rsqrt() * router.scale
        logits = reference.soft_logits(x, unit.flatten(1))
        masked = logits if mask is None else logits.masked_fill(~mask[..., None], -1e300)
        shape = (groups, tokens, experts, 1)
        sound = torch.ones(groups, tokens, 1, 1) if mask is None else mask[..., None, None].double()
        close(routing.dispatch_tensor(), masked.softmax(1).view(shape) * sound)
        close(routing.combine_tensor(), logits.softmax(2).view(shape) * sound)
        return
    plain = x if mask is None else x.masked_fill(~mask[..., None], 0)
    logits = router.logits(plain)
    selecting, weighing = gates_of(router, name, fixed, logits, mask, routing.capacity)
    # Gates that differ only by rounding may have either order.
    if name.startswith("softmax"):
        selecting = vr.ops.softmax_gather(logits, torch.arange(experts).expand(logits.shape).int().contiguous())
    else:
        gaps = selecting.flatten(1).sort(1)[0].diff(dim=1)
        assume(not ((gaps < 1e-9) & (selecting.flatten(1).sort(1)[0][:, 1:] > 0)).any())
    selecting = selecting if mask is None else selecting.masked_fill(~mask[..., None], -INF)
    if name.endswith("token_choice"):
        arguments = (options["top_k"], routing.capacity, options["batch_priority"], options["renormalize"])
        wanted = token_choice(selecting, weighing, *arguments)
    else:
        wanted = expert_choice(selecting, weighing, routing.capacity, options["renormalize"])
    identical(routing.dispatch_tensor(), wanted[0])
    # Adam divides by the root of the gradient's square, so it enlarges rounding where a gradient is 0.
    close(routing.combine_tensor(), wanted[1], slack=1e4 if name.startswith("sparsity") else 1)


@each_router
@given(data=st.data())
def test_layer(name, fixed, data):
    """A layer equals the products with its dense tensors, and masked tokens affect nothing."""
    batch, tokens, experts = data.draw(GROUPS), data.draw(TOKENS), data.draw(EXPERTS)
    options = dict(fixed)
    if name != "soft":
        options["capacity_factor"] = data.draw(st.sampled_from((1.0, 0.1, 10.0)))
    if name.endswith("token_choice"):
        options["top_k"] = data.draw(sizes(experts))
    layer = vr.MoEMlp(5, 6, num_experts=experts, router=name, group_size=max(batch, 1), **options).eval()
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    layer = layer.to(dtype)
    x = data.draw(tensors(batch, tokens, 5, dtype=dtype, finite=True, moderate=True)).detach().requires_grad_()
    mask = data.draw(masks(batch, tokens))
    y = layer(x, mask)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert y.shape == x.shape
    if batch == 0:
        return
    group = x.reshape(1, batch * tokens, 5)
    routing = layer.router(group, None if mask is None else mask.reshape(1, -1))
    D, B = routing.dispatch_tensor(), routing.combine_tensor()
    plain = layer.experts(torch.einsum("gtec,gtd->egcd", D, group))
    wanted = torch.einsum("gtec,egcd->gtd", B, plain)
    size = 1 + group.detach().abs().amax().item() if group.numel() else 1.0
    close(y, wanted.reshape(x.shape).detach().double(), size, slack=10)
    (wanted_grad,) = torch.autograd.grad(wanted.square().sum(), x)
    close(grad, wanted_grad.double(), 100 * size**2, slack=100)
    if mask is None:
        return
    assert (y[~mask] == 0).all()
    assert (grad[~mask] == 0).all()
    poisoned = x.detach().masked_fill(~mask[..., None], data.draw(st.sampled_from((math.nan, INF, 1e30))))
    poisoned.requires_grad_()
    again = layer(poisoned, mask)
    identical(again.detach(), y.detach())
    identical(torch.autograd.grad(again.square().sum(), poisoned)[0], grad)


@each_router
@given(data=st.data())
def test_hostile_tokens(pytestconfig, name, fixed, data):
    """With tokens of any scale, NaN and infinities, no group affects another group, and finite gates stay finite."""
    # On CUDA, one product has the tokens of all groups, so the number of groups changes last bits of Soft MoE.
    same = close if name == "soft" and pytestconfig.getoption("--cuda-on-host") else identical
    tokens, experts = data.draw(TOKENS), data.draw(EXPERTS)
    router = vr.create_router(name, 5, experts, **fixed)
    if name != "soft":
        router.loss_weights = dict.fromkeys(router.loss_weights, 0.1)
        # The number of rows changes the bits of a matrix product in torch.
        router.logits.forward = lambda x: (x.unsqueeze(2) * router.weight).sum(-1)
    x = data.draw(tensors(2, tokens, 5, dtype=torch.float32)).detach().contiguous().requires_grad_()
    router.eval()
    both, alone = router(x), router(x[1:])
    same(both.dispatch_tensor()[1:], alone.dispatch_tensor())
    same(both.combine_tensor()[1:], alone.combine_tensor())
    slots = both.dispatch(x)
    assert slots.shape == (experts, 2, both.capacity, 5)
    out = both.combine(slots)
    size = {"bound": alone.combine(slots[:, 1:].abs())[0]} if same is close else {}
    same(both.combine(slots)[1], alone.combine(slots[:, 1:].contiguous())[0], **size)
    (out.nan_to_num().sum() + both.aux_loss).backward()
    if x.numel() and x.isfinite().all() and x.abs().max() < 1e15:
        assert out.isfinite().all()
        assert x.grad.isfinite().all(), x.grad
        assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())
        assert all(value.isfinite().all() for value in both.metrics.values())
