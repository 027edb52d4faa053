"""Every op against the plain reference, on tensors of any shape, dtype, layout and scale (`strategies.py`).

Contracts state which entries may overflow. All other entries are compared with the float64 reference on the same
rounded inputs, and NaN and infinities must appear where the reference has them.
"""

from __future__ import annotations

import math

import torch
from comparing import TOLERANCE, close, exact, gradients, identical, leaf
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, EXPERTS, GROUPS, INF, TOKENS, WIDTHS, masks, sizes, tensors

from vmoe_routers import ops
from vmoe_routers.ops import reference

INT32 = (-(2**31), -2, -1, 0, 1, 2, 3, 100, 2**31 - 1)
dtypes = st.sampled_from(DTYPES)
wide_dtypes = st.sampled_from(DTYPES[:2])


def noise(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@st.composite
def indices(draw: st.DrawFn, *shape: int, below: int) -> torch.Tensor:
    """Draws int32 indices in [0, below). Replaces none, some or all of them by values of INT32, mostly out of range."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randint(0, max(below, 1), shape, generator=generator)
    share = draw(st.sampled_from((0.0, 0.2, 1.0)))
    bad = torch.tensor(INT32)[torch.randint(len(INT32), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < share, bad, x).int()


def multiplied_in_half(x: torch.Tensor) -> bool:
    """Tells whether products take the entries of `x` in 16 bits: on CUDA and on its emulator."""
    return x.dtype in DTYPES[2:] and ops._dtypes.product_dtype(x, torch.float32) == x.dtype


def underflow(x: torch.Tensor) -> float:
    """Returns the largest error of a tiny factor of a product in the 16-bit dtype of `x`.

    In float16 the error is half of the smallest subnormal number. In bfloat16 the error is the smallest normal number,
    because products of bfloat16 on CPUs, which the emulator calls, take subnormal factors as 0.
    """
    limits = torch.finfo(x.dtype)
    return limits.smallest_normal * (limits.eps / 2 if x.dtype == torch.float16 else 1)


def largest(x: torch.Tensor) -> float:
    """Returns the largest absolute value, or infinity if NaN or infinity is among the values."""
    return x.detach().double().abs().nan_to_num(nan=INF, posinf=INF).max().item() if x.numel() else 0.0


@given(st.data())
def test_topk(data):
    shape = [data.draw(size) for size in (GROUPS, TOKENS, EXPERTS)]
    dim = data.draw(st.sampled_from((-1, 0, 1, 2)))
    k = data.draw(sizes(shape[dim]))
    x = leaf(data.draw(tensors(*shape, dtype=data.draw(dtypes))))
    values, picks = ops.topk(x, k, dim)
    wanted, wanted_picks = reference.topk(x, k, dim)
    identical(picks, wanted_picks)
    identical(values, wanted)
    weight = noise(values.shape).to(x.dtype)
    identical(*(torch.autograd.grad(v, x, weight)[0] for v in (values, wanted)))


@given(st.data())
def test_softmax_gather(data):
    groups, tokens, experts = (data.draw(size) for size in (GROUPS, TOKENS, EXPERTS))
    dim = data.draw(st.sampled_from((1, 2)))
    rows, places = (tokens, experts) if dim == 2 else (experts, tokens)
    picks = data.draw(indices(groups, rows, data.draw(st.integers(0, 9)), below=places))
    x = leaf(data.draw(tensors(groups, tokens, experts, dtype=data.draw(dtypes))))
    weight = noise(tuple(picks.shape)).to(x.dtype)
    got, (grad,) = gradients(lambda x: ops.softmax_gather(x, picks, dim), [x], weight)
    wanted, (wanted_grad,) = gradients(lambda x: reference.softmax_gather(x, picks, dim), [exact(x)], weight)
    close(got, wanted)
    close(grad, wanted_grad, picks.shape[1] * 4.0)


@given(st.data())
def test_softmax_topk(data):
    groups, tokens, experts = (data.draw(size) for size in (GROUPS, TOKENS, EXPERTS))
    dim = data.draw(st.sampled_from((1, 2)))
    k = data.draw(sizes((groups, tokens, experts)[dim]))
    mask = data.draw(masks(groups, tokens))
    x = leaf(data.draw(tensors(groups, tokens, experts, dtype=data.draw(dtypes))))
    values, picks = ops.softmax_topk(x, k, dim, mask=mask)
    # The op compares its computed gates, so the picks are the top-k of these gates, to the bit.
    wide = x.detach().to(ops._dtypes.compute_dtype(x.dtype))
    wide = wide if mask is None else wide.masked_fill(~mask[..., None], -INF)
    every = torch.arange(experts, dtype=torch.int32).expand(x.shape).contiguous()
    absent = (wide == -INF).all(2, keepdim=True)
    gates = ops.softmax_gather(wide, every).masked_fill(absent, -INF)
    wanted, wanted_picks = reference.topk(gates, k, dim)
    empty = wanted == -INF
    identical(picks, wanted_picks.masked_fill(empty, -1))
    identical(values, wanted.masked_fill(empty, 0).to(x.dtype))
    weight = noise(tuple(values.shape)).to(x.dtype)
    (grad,) = torch.autograd.grad(values, x, weight)
    precise = exact(x)
    masked = precise if mask is None else precise.masked_fill(~mask[..., None], -INF)
    (wanted_grad,) = torch.autograd.grad(reference.softmax_gather(masked, picks, dim), precise, weight.double())
    close(grad, wanted_grad, picks.shape[1] * 4.0)


@given(st.data())
def test_assign_slots(data):
    groups, tokens, experts = (data.draw(size) for size in (GROUPS, TOKENS, EXPERTS))
    expert = data.draw(indices(groups, tokens, data.draw(st.integers(0, 4)), below=experts))
    capacity = data.draw(st.sampled_from((1, 0, 2, 3, tokens, 2 * tokens + 1)))
    priority = None
    if data.draw(st.booleans()):
        priority = data.draw(tensors(groups, tokens, dtype=data.draw(dtypes)))
    got = ops.assign_slots(expert, experts, capacity, priority)
    for ours, wanted in zip(got, reference.assign_slots(expert, experts, capacity, priority), strict=True):
        identical(ours, wanted)


@st.composite
def slot_lists(draw: st.DrawFn, groups: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """Draws token [G, E, C], with empty slots, and its offsets and slots."""
    token = draw(indices(groups, draw(EXPERTS), draw(st.integers(0, 6)), below=tokens))
    return token, *reference.invert_slots(token, tokens)[:2]


@given(st.data())
def test_invert_slots(data):
    groups, tokens = data.draw(GROUPS), data.draw(TOKENS)
    token = data.draw(indices(groups, data.draw(EXPERTS), data.draw(st.integers(0, 6)), below=tokens))
    for ours, wanted in zip(ops.invert_slots(token, tokens), reference.invert_slots(token, tokens), strict=True):
        identical(ours, wanted)


@given(st.data())
def test_dispatch(data):
    groups, tokens, width = (data.draw(size) for size in (GROUPS, TOKENS, WIDTHS))
    lists = data.draw(slot_lists(groups, tokens))
    x = leaf(data.draw(tensors(groups, tokens, width, dtype=data.draw(dtypes))))
    experts, capacity = lists[0].shape[1:]
    weight = data.draw(tensors(experts, groups, capacity, width, dtype=x.dtype))
    got, (grad,) = gradients(lambda x: ops.dispatch(x, *lists), [x], weight)
    identical(got, reference.dispatch(x.detach(), *lists))
    _, (wanted,) = gradients(lambda x: reference.dispatch(x, *lists), [exact(x)], weight)
    _, (bound,) = gradients(lambda x: reference.dispatch(x, *lists), [exact(x)], weight.abs())
    close(grad, wanted, bound)


@given(st.data())
def test_combine(data):
    groups, tokens, width = (data.draw(size) for size in (GROUPS, TOKENS, WIDTHS))
    lists = data.draw(slot_lists(groups, tokens))
    experts, capacity = lists[0].shape[1:]
    y = leaf(data.draw(tensors(experts, groups, capacity, width, dtype=data.draw(dtypes))))
    gate = leaf(
        data.draw(tensors(groups, experts, capacity, dtype=data.draw(st.sampled_from((y.dtype, torch.float32)))))
    )
    weight = data.draw(tensors(groups, tokens, width, dtype=y.dtype))
    rounded = gate.detach().to(ops._dtypes.compute_dtype(y.dtype))
    got, grads = gradients(lambda y, gate: ops.combine(y, gate, *lists), [y, gate], weight)

    def plain(y, gate):
        return reference.combine(y, gate, *lists)

    wanted, wanted_grads = gradients(plain, [exact(y), exact(rounded)], weight)
    bound, bounds = gradients(plain, [exact(y.abs()), exact(rounded.abs())], weight.abs())
    close(got, wanted, bound)
    for grad, wanted_grad, size in zip(grads, wanted_grads, bounds, strict=True):
        close(grad, wanted_grad, size)


@given(st.data())
def test_sinkhorn(data):
    groups, tokens, experts = (data.draw(size) for size in (GROUPS, TOKENS, EXPERTS))
    mask = data.draw(masks(groups, tokens))
    x = leaf(data.draw(tensors(groups, tokens, experts, dtype=data.draw(dtypes))))
    epsilon = data.draw(st.sampled_from((1.0, 0.05, 30.0, 1e-30, 1e30)))
    iterations = data.draw(st.sampled_from((1, 2, 5, 20)))
    options = {"epsilon": epsilon, "iterations": iterations, "mask": mask}
    implicit = data.draw(st.booleans())
    gradient = {"gradient": "implicit" if implicit else "unrolled"}
    plan, error, steps = ops.sinkhorn(x, return_error=True, **options, **gradient)
    weight = noise(tuple(x.shape)).to(x.dtype)
    (grad,) = torch.autograd.grad(plan, x, weight)
    assert error.shape == steps.shape == (groups,)
    assert ((steps >= 0) & (steps <= iterations)).all()
    M = x.detach().double() / epsilon
    M = M if mask is None else M.masked_fill(~mask[..., None], -INF)
    overflow = M.isinf() & x.isfinite() & (True if mask is None else mask[..., None])
    bad = (M.isnan() | (M == INF) | overflow).flatten(1).any(1)
    assert plan[bad].isnan().all()
    # Rows of the plan are distributions over the experts, however large the logits are.
    present = ~(M == -INF).all(2)
    sound, rows = ~bad, plan.detach().double().sum(2)
    assert plan[sound].isfinite().all()
    assert (plan[sound] >= 0).all()
    assert (plan[sound][~present[sound]] == 0).all()
    rounding = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(x.dtype, 1e-5)
    assert ((rows - 1).abs() <= rounding)[sound[:, None] & present].all(), rows
    if 1e3 * max(1, tokens) < epsilon * torch.finfo(x.dtype).max:
        assert grad[sound].isfinite().all()
    assert (grad[sound][~present[sound]] == 0).all()
    # If |M| is large, rounding errors in the reference are larger than the plan.
    small = sound & (M.masked_fill(M == -INF, 0).abs().flatten(1).amax(1) < 1e3 if M[0:1].numel() else sound)
    if small.any():
        chosen = {**options, "mask": None if mask is None else mask[small]}
        precise = exact(x.detach()[small])
        wanted, (wanted_grad,) = gradients(
            lambda x: reference.sinkhorn(x, **chosen, **gradient), [precise], weight[small]
        )
        close(plan[small], wanted, slack=20)
        if not implicit:
            close(grad[small], wanted_grad, 4 / epsilon * max(1, tokens / experts), slack=50)


@given(st.data())
def test_ksparse_projection(data):
    rows, n = data.draw(GROUPS), data.draw(EXPERTS)
    k = data.draw(sizes(n))
    x = leaf(data.draw(tensors(rows, n, dtype=data.draw(dtypes))))
    weight = noise((rows, n)).to(x.dtype)
    got, (grad,) = gradients(lambda x: ops.ksparse_projection(x, k), [x], weight)
    close(got, reference.ksparse_projection(x.detach().double(), k))
    # The support may differ by entries that round to 0, so the gradient is computed on the support that the op found.
    sound = ~got.isnan().any(1)
    support = (got != 0).double()
    assert (support[sound].sum(1) <= k).all()
    mean = (weight.double() * support).sum(1, keepdim=True) / support.sum(1, keepdim=True).clamp(min=1)
    if x.dtype in DTYPES[:2]:  # smaller dtypes round entries of the support to 0
        close(grad[sound], (support * (weight.double() - mean))[sound], 4.0)


@given(st.data())
def test_ksparse_transport(data):
    groups, tokens, experts = (data.draw(size) for size in (GROUPS, TOKENS, EXPERTS))
    k = data.draw(sizes(tokens))
    mask = data.draw(masks(groups, tokens))
    moderate = data.draw(st.booleans())
    x = leaf(data.draw(tensors(groups, tokens, experts, dtype=data.draw(wide_dtypes), moderate=moderate)))
    solver = data.draw(st.sampled_from(("adam", "lbfgs")))
    iterations = data.draw(st.sampled_from((0, 1, 7)))
    options = {"solver": solver, "iterations": iterations, "mask": mask}
    options |= {"gamma": data.draw(st.sampled_from((1.0, 0.1, 1e-20, 1e20)))}
    options |= {"learning_rate": data.draw(st.sampled_from((0.01, 1e-20, 1e20)))}
    plan = ops.ksparse_transport(x, k, **options)
    (grad,) = torch.autograd.grad(plan, x, torch.ones_like(plan))
    filled = x.detach().double() if mask is None else x.detach().double().masked_fill(~mask[..., None], -INF)
    bad = (filled.isnan() | (filled == INF)).flatten(1).any(1)
    assert plan[bad].isnan().all()
    sound, plans = ~bad, plan.detach().double()
    present = ~(filled == -INF).all(2)
    assert plan[sound].isfinite().all(), plan
    assert grad[sound].isfinite().all()
    assert (plan[sound] >= 0).all()
    assert (plan[sound][~present[sound]] == 0).all()
    assert ((plan != 0).sum(1) <= k)[sound].all()
    taken = ~(filled == -INF).all(1)  # [G, E]
    share = (present.sum(1, keepdim=True).double() / experts).expand(groups, experts) * taken
    close(plans.sum(1)[sound].to(x.dtype), share[sound], share[sound].clamp(min=1e-3))
    tiny = (filled.abs() < 1e-290 * options["gamma"]) & (filled != 0)  # divided by gamma, they round to equal numbers
    if iterations == 0 and tokens and x.dtype == torch.float64 and not tiny.any():
        wanted = reference.ksparse_transport(x.detach(), k, **{**options, "solver": "adam"})
        close(plan[sound], wanted[sound], float(tokens))


@given(st.data())
def test_soft_logits(data):
    groups, tokens, width, slots = (data.draw(size) for size in (GROUPS, TOKENS, WIDTHS, EXPERTS))
    dtype = data.draw(dtypes)
    x = leaf(data.draw(tensors(groups, tokens, width, dtype=dtype)))
    phi = leaf(data.draw(tensors(width, slots, dtype=data.draw(st.sampled_from((dtype, torch.float32))))))
    weight = noise((groups, tokens, slots))
    got, grads = gradients(ops.soft_logits, [x, phi], weight)
    wanted, wanted_grads = gradients(reference.soft_logits, [exact(x), exact(phi)], weight.to(got.dtype))
    xs, phis, scaled = (v.detach().double().abs() for v in (x, phi, weight))
    norm = (x.detach().double().square().sum(2, keepdim=True) + 1e-6).rsqrt()
    scaled *= norm
    overflow, slack, slack_of_phi = torch.zeros(slots, dtype=torch.bool), 1.0, 1.0
    if multiplied_in_half(x):  # phi is split into two parts of 16 bits, and the scaled gradient is rounded to 16 bits
        overflow = ((phis > torch.finfo(dtype).max) & phis.isfinite()).any(0)
        slack, slack_of_phi = 2.0, torch.finfo(dtype).eps / TOLERANCE[torch.float32]
        phis = phis.clamp(min=underflow(x) / TOLERANCE[torch.float32])
        scaled = scaled.clamp(min=underflow(x) / torch.finfo(dtype).eps)
    # The product of tokens and phi must not overflow before it is scaled by 1 / |x|.
    terms = torch.einsum("gtd,ds->gts", xs, phis)
    size = wanted.abs().masked_fill((terms > torch.finfo(got.dtype).max / 4) | overflow, INF)
    close(got, wanted, torch.maximum(size, terms * norm), slack=slack)
    bound_x = torch.einsum("gts,ds->gtd", scaled, phis).masked_fill(overflow.any(), INF)
    bound_x = bound_x.sum(2, keepdim=True).expand_as(bound_x)
    close(grads[0], wanted_grads[0], bound_x * 2)
    close(grads[1], wanted_grads[1], torch.einsum("gtd,gts->ds", xs, scaled), slack=slack_of_phi)


@given(st.data())
def test_soft_mix(data):
    groups, tokens, experts, width = (data.draw(size) for size in (GROUPS, TOKENS, EXPERTS, WIDTHS))
    capacity, dim = data.draw(st.integers(1, 3)), data.draw(st.sampled_from((1, 2)))
    dtype = data.draw(dtypes)
    logits = leaf(
        data.draw(tensors(groups, tokens, experts * capacity, dtype=data.draw(st.sampled_from((dtype, torch.float32)))))
    )
    shape = (groups, tokens, width) if dim == 1 else (experts, groups, capacity, width)
    values = leaf(data.draw(tensors(*shape, dtype=dtype)))
    weight = data.draw(
        tensors(*((experts, groups, capacity, width) if dim == 1 else (groups, tokens, width)), dtype=dtype)
    )

    def plain(logits, values):
        return reference.soft_mix(logits, values, dim, experts)

    got, grads = gradients(lambda *both: ops.soft_mix(*both, dim, experts), [logits, values], weight)
    wanted, wanted_grads = gradients(plain, [exact(logits), exact(values)], weight)
    bound, bounds = gradients(plain, [exact(logits), exact(values.abs())], weight.abs())
    slack = 1.0
    if multiplied_in_half(values):  # the weights are rounded to 16 bits
        slack, tiny = 2.0, underflow(values) / TOLERANCE[dtype]
        mixed, mixed_grad = (v.double().abs().sum((0, 2) if v.ndim == 4 else 1)[:, None] for v in (values, weight))
        bound, bounds[1] = bound + tiny * mixed, bounds[1] + tiny * mixed_grad
    close(got, wanted, bound, slack=slack)
    close(grads[1], wanted_grads[1], bounds[1], slack=slack)
    size = 4.0 * width * largest(values) * largest(weight)
    close(grads[0], wanted_grads[0], INF if math.isnan(size) else size)  # NaN: zeros times a cotangent of infinity


@given(st.data())
def test_grouped_mlp(data):
    experts, groups, width, hidden, wide = (data.draw(size) for size in (EXPERTS, GROUPS, WIDTHS, WIDTHS, WIDTHS))
    capacity, dtype = data.draw(st.integers(0, 5)), data.draw(wide_dtypes)
    experts = min(experts, 9)
    shapes = [(experts, groups * capacity, width), (experts, width, hidden), (experts, hidden, wide)]
    x, w1, w2 = (leaf(data.draw(tensors(*shape, dtype=dtype))) for shape in shapes)
    b1, b2 = (leaf(data.draw(tensors(experts, size, dtype=dtype))) for size in (hidden, wide))
    filled = None
    rows = torch.ones(experts, groups, capacity, dtype=torch.bool)
    if groups and data.draw(st.booleans()):
        filled = data.draw(indices(experts, groups, below=capacity + 1)).clamp(0, capacity)
        rows = torch.arange(capacity) < filled[..., None]
    rows = rows.view(experts, -1, 1)
    act = data.draw(st.sampled_from(("gelu_tanh", "gelu")))
    function = reference.GELU_TANH if act == "gelu_tanh" else torch.nn.functional.gelu
    biased = data.draw(st.booleans())
    inputs = [x, w1, w2, b1, b2] if biased else [x, w1, w2]

    def ours(x, w1, w2, b1=None, b2=None):
        return ops.grouped_mlp(x, w1, b1, w2, b2, act, filled)

    def plain(x, w1, w2, b1=None, b2=None):
        return reference.grouped_mlp(x.masked_fill(~rows, 0), w1, b1, w2, b2, function).masked_fill(~rows, 0)

    weight = data.draw(tensors(experts, groups * capacity, wide, dtype=dtype, moderate=True, finite=True))
    got, grads = gradients(ours, inputs, weight)
    wanted, wanted_grads = gradients(plain, [exact(v) for v in inputs], weight)
    # Compare the experts whose inputs are finite and whose products cannot overflow.
    xs, w1s, w2s = (v.detach().double().abs() for v in (x, w1, w2))
    b1s, b2s = (v.detach().double().abs()[:, None] if biased else 0 for v in (b1, b2))
    pre = torch.einsum("end,edf->enf", xs.masked_fill(~rows, 0), w1s) + b1s
    bound = torch.einsum("enf,efd->end", pre, w2s) + b2s
    gate = 1.2 * torch.einsum("end,efd->enf", weight.double().abs(), w2s)
    bounds = [
        torch.einsum("enf,edf->end", gate, w1s),
        torch.einsum("end,enf->edf", xs, gate),
        torch.einsum("enf,end->efd", pre, weight.double().abs()),
        gate.sum(1),
        weight.double().abs().sum(1),
    ]
    top = torch.finfo(dtype).max / 4
    fine = torch.stack(
        [~(v > top).flatten(1).any(1) & v.isfinite().flatten(1).all(1) for v in (pre, bound, gate, *bounds, *inputs)]
    ).all(0)
    close(got[fine], wanted[fine], bound[fine])
    for grad, wanted_grad, size in zip(grads, wanted_grads, bounds, strict=False):
        close(grad[fine], wanted_grad[fine], size[fine])
    assert (got[(~rows).expand_as(got)] == 0).all()
