"""Expert Choice with its three affinities, against a ranking in plain Python."""

import math

import pytest
import torch

import vmoe_routers as vr

NAMES = (
    "softmax_expert_choice",
    "sinkhorn_expert_choice",
    "sparsity_constrained_expert_choice",
)


def rank(values):
    """Returns indices from the largest value to the smallest, ties by index."""
    values = [float(v) for v in values]
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def fill(select, slots, mask=None):
    """Returns the dense dispatch tensor [T, E, C] of one group, in which every expert takes its best tokens."""
    T, E = select.shape
    D = torch.zeros(T, E, min(slots, T), dtype=torch.float64)
    for e in range(E):
        best = [t for t in rank(select[:, e]) if mask is None or mask[t]]
        for c, t in enumerate(best[:slots]):
            D[t, e, c] = 1
    return D


def sinkhorn(logits, iterations=20):
    """Computes Sinkhorn without logarithms: scales columns, then rows, from potentials of 0."""
    plan = logits.double().exp()
    T, E = plan.shape[-2:]
    for _ in range(iterations):
        plan = plan * (T / E) / plan.sum(-2, keepdim=True)
        plan = plan / plan.sum(-1, keepdim=True)
    return plan


def project(x, k):
    """Projects a list of numbers onto the simplex with at most k non-zeros, by the formula."""
    best = rank(x)[:k]
    u = [x[i] for i in best]
    rho = max(r for r in range(1, k + 1) if 1 + r * u[r - 1] > sum(u[:r]))
    tau = (sum(u[:rho]) - 1) / rho
    p = [0.0] * len(x)
    for i in best:
        p[i] = max(x[i] - tau, 0.0)
    return p


def ksparse_plan(similarity, k, iterations=20, rate=0.01, tolerance=1e-3):
    """Computes the sparsity-constrained plan of one group [T, E], by Adam on the semi-dual."""
    S = similarity.tolist()
    T, E = len(S), len(S[0])
    b = T / E
    alpha, m, v = [0.0] * T, [0.0] * T, [0.0] * T

    def columns():
        scores = [[(alpha[t] + S[t][e]) / b for t in range(T)] for e in range(E)]
        return [[b * p for p in project(column, k)] for column in scores]

    for i in range(1, iterations + 1):
        plan = columns()
        gradient = [1 - sum(plan[e][t] for e in range(E)) for t in range(T)]
        for t in range(T):
            m[t] = 0.9 * m[t] + 0.1 * gradient[t]
            v[t] = 0.999 * v[t] + 0.001 * gradient[t] ** 2
            alpha[t] += rate * (m[t] / (1 - 0.9**i)) / (math.sqrt(v[t] / (1 - 0.999**i)) + 1e-8)
        if math.sqrt(sum(g * g for g in gradient)) <= tolerance:
            break
    return torch.tensor(columns(), dtype=torch.float64).T


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 5, 12, 30])
def test_every_expert_takes_its_best(slots, masked):
    G, T, E = 4, 12, 5
    gates = torch.randn(G, T, E).double().softmax(-1)
    gates[1] = gates[1, 0]  # all tokens are alike
    gates[2] = (gates[2] * 4).round() / 4  # many ties
    weights = torch.rand(G, T, E).double()
    mask = torch.rand(G, T) > 0.3 if masked else None
    routing = vr.expert_choice(gates, slots, weights=weights, mask=mask)
    wanted = torch.stack([fill(gates[g], slots, mask[g] if masked else None) for g in range(G)])
    assert routing.capacity == min(slots, T)
    assert torch.equal(routing.dispatch_tensor(), wanted)
    assert torch.equal(routing.combine_tensor(), wanted * weights[..., None])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.25, 1.0, 2.0, 9.0])
def test_every_expert_holds_exactly_its_capacity(name, factor):
    router = vr.create_router(name, 6, 5, capacity_factor=factor)
    routing = router(torch.randn(3, 16, 6))
    slots = min(16, max(1, round(16 * factor / 5)))
    D = routing.dispatch_tensor()
    assert routing.capacity == slots
    assert (D.sum((1, 3)) == slots).all()
    assert (D.sum(1) == 1).all(), "every slot holds one token"
    assert D.sum(3).max() <= 1, "no expert takes a token twice"


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0, 6.0])
@pytest.mark.parametrize(
    ("name", "combine"),
    [(NAMES[0], None), *((name, combine) for name in NAMES[1:] for combine in ("softmax", "plan"))],
)
def test_routers(name, combine, factor, training):
    G, T, D, E = 2, 11, 6, 4
    options = {} if combine is None else {"combine": combine}
    if name != "sparsity_constrained_expert_choice":
        options["noise_std"] = 3.0
    router = vr.create_router(name, D, E, capacity_factor=factor, dtype=torch.float64, **options)
    router.train(training)
    noise = torch.randn(G, T, E).double()
    router.draw_noise = lambda logits: noise
    x = torch.randn(G, T, D).double()
    logits = torch.einsum("gtd,ed->gte", x, router.weight.detach())
    noisy = logits + 3.0 / E * noise if training else logits
    slots = min(T, round(T * factor / E))
    if name == "sparsity_constrained_expert_choice":  # no noise
        gates = logits.softmax(-1)
        select = torch.stack([ksparse_plan(group, slots) for group in gates])
    else:
        gates = noisy.softmax(-1)
        select = gates if name == "softmax_expert_choice" else sinkhorn(noisy)
    weigh = select if combine == "plan" else gates
    wanted = torch.stack([fill(select[g], slots) for g in range(G)])
    routing = router(x)
    assert torch.equal(routing.dispatch_tensor(), wanted)
    torch.testing.assert_close(routing.combine_tensor(), wanted * weigh[..., None], atol=1e-11, rtol=0)


def test_experts_fill_free_slots_with_tokens_whose_plan_entry_is_zero():
    # The similarities are so far apart that a column of the plan has fewer non-zeros than slots.
    router = vr.create_router(
        "sparsity_constrained_expert_choice", 6, 6, capacity_factor=4.0, dtype=torch.float64
    ).eval()
    with torch.no_grad():
        router.weight.copy_(torch.eye(6) * 30)
    x = torch.eye(6).double()[None, [1, 0, 2]]
    gates = (x * 30).softmax(-1)
    plan = ksparse_plan(gates[0], 2)
    assert ((plan != 0).sum(0)[:3] == 1).all()
    routing = router(x)
    D = routing.dispatch_tensor()
    assert torch.equal(D[0], fill(plan, 2))
    assert D[0].argmax(0)[:3].tolist() == [[1, 0], [0, 1], [2, 0]]
    torch.testing.assert_close(routing.combine_tensor(), D * gates[..., None], atol=1e-12, rtol=0)


def test_options_of_the_sparse_plan():
    x = torch.randn(2, 9, 5).double()
    for options in ({"iterations": 0}, {"iterations": 5, "learning_rate": 0.1}, {"tolerance": 50.0}):
        router = vr.create_router(
            "sparsity_constrained_expert_choice",
            5,
            3,
            combine="plan",
            dtype=torch.float64,
            **options,
        ).eval()
        gates = torch.einsum("gtd,ed->gte", x, router.weight.detach()).softmax(-1)
        naive = {"rate" if key == "learning_rate" else key: v for key, v in options.items()}
        plan = torch.stack([ksparse_plan(group, 3, **naive) for group in gates])
        torch.testing.assert_close(router(x).weights.detach(), plan, atol=1e-11, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_tokens_permutes_outputs(name):
    router = vr.create_router(name, 6, 4).double().eval()
    x = torch.randn(3, 16, 6).double()
    routing = router(x)
    if name == "sparsity_constrained_expert_choice":
        logits = torch.einsum("gtd,ed->gte", x, router.weight.detach())
        plan = vr.ksparse_transport(logits.softmax(-1), 4)
        assert ((plan != 0).sum(1) == 4).all(), "experts take tokens whose plan entry is 0 by index, not by value"
    order = torch.randperm(16)
    permuted = router(x[:, order])
    for tensor in ("dispatch_tensor", "combine_tensor"):
        got, wanted = getattr(permuted, tensor)(), getattr(routing, tensor)()[:, order]
        torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_ties_go_to_the_lower_index(name):
    router = vr.create_router(name, 4, 3, noise_std=0.0, capacity_factor=1.0)
    torch.nn.init.zeros_(router.weight)
    D = router(torch.randn(2, 9, 4)).dispatch_tensor()
    wanted = torch.zeros(9, 3, 3)
    for e in range(3):
        for c in range(3):
            wanted[c, e, c] = 1  # tokens 0, 1, 2 for every expert
    assert torch.equal(D, wanted.expand(2, -1, -1, -1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ids_are_unique_and_in_range_for_any_gates(bad):
    gates = torch.randn(3, 8, 5).softmax(-1)
    clean = vr.expert_choice(gates, 3)
    gates[1, 2] = bad
    gates[1, 5, 3] = bad
    gates[2] = bad
    D = vr.expert_choice(gates, 3).dispatch_tensor()
    assert D.sum(1).max() <= 1
    assert D.sum(3).max() <= 1
    assert torch.equal(D[0], clean.dispatch_tensor()[0]), "another group is as it was"
    if bad == -math.inf:
        assert D[1, 2].sum() == D[2].sum() == 0, "a gate of -inf is never taken"
        assert (D[1].sum((0, 2)) == 3).all()
    else:
        assert (D.sum(1) == 1).all()
        assert (D[1, 2].sum(-1) == 1).all(), "NaN and infinity count as the largest"


def test_slots_stay_empty_if_no_token_remains():
    gates = torch.tensor([[[0.5, -math.inf], [-math.inf, -math.inf], [0.9, 0.1]]])
    routing = vr.expert_choice(gates, 3)
    wanted = torch.zeros(1, 3, 2, 3)
    wanted[0, 2, 0, 0] = wanted[0, 0, 0, 1] = wanted[0, 2, 1, 0] = 1
    assert torch.equal(routing.dispatch_tensor(), wanted)
    assert torch.equal(routing.dispatch(torch.ones(1, 3, 2))[:, 0, :, 0], wanted[0].sum(0))


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 1, 3), (2, 1, 40)])
@pytest.mark.parametrize("name", NAMES)
def test_small_groups(name, shape):
    G, T, E = shape
    router = vr.create_router(name, 6, E).eval()
    x = torch.randn(G, T, 6, requires_grad=True)
    routing = router(x)
    out = routing.combine(routing.dispatch(x))
    assert out.shape == x.shape
    if T == 1:  # every expert takes the only token, so its gates sum to 1
        assert routing.capacity == 1
        torch.testing.assert_close(out, x)
    out.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_capacity_of_the_router(name):
    options = {"capacity_factor": 0.8, "eval_capacity_factor": 3.0}
    router = vr.create_router(name, 4, 6, **options)
    up = vr.create_router(name, 4, 6, capacity_rounding="ceil", capacity_multiple_of=4, **options)
    for tokens in (1, 2, 5, 15, 49):
        x = torch.randn(2, tokens, 4)
        for training, factor in ((True, 0.8), (False, 3.0)):
            share = tokens * factor / 6
            assert router.train(training)(x).capacity == min(tokens, max(1, round(share)))
            slots = max(1, math.ceil(share))
            assert up.train(training)(x).capacity == min(tokens, slots + -slots % 4)


@pytest.mark.parametrize("combine", ["softmax", "plan"])
@pytest.mark.parametrize("name", NAMES[1:])
def test_gradient_of_the_gates(name, combine):
    """The router gets a gradient through the plan only with combine="plan". Selecting tokens gives no gradient."""
    router = vr.create_router(name, 5, 4, combine=combine, dtype=torch.float64).eval()
    x = torch.randn(2, 8, 5).double()
    routing = router(x)
    v = torch.randn_like(routing.combine_tensor())
    (got,) = torch.autograd.grad((routing.combine_tensor() * v).sum(), router.weight)

    weight = router.weight.detach().clone().requires_grad_()
    logits = torch.einsum("gtd,ed->gte", x, weight)
    gates = logits.softmax(-1)
    if combine == "plan" and name == "sinkhorn_expert_choice":
        gates = sinkhorn(logits)  # the gradient goes through all iterations
    elif combine == "plan":
        # The potentials alpha are constants. So on the support of a column, the differential of the plan is the
        # differential of the gates minus its mean over the support.
        plan = torch.stack([ksparse_plan(group.detach(), 2) for group in gates])
        support = plan != 0
        inside = gates * support
        inside = inside - inside.sum(1, keepdim=True) / support.sum(1, keepdim=True)
        gates = plan + (inside - inside.detach()) * support
    (wanted,) = torch.autograd.grad((routing.dispatch_tensor() * gates[..., None] * v).sum(), weight)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_renormalize_divides_by_the_weights_of_the_taken_slots(masked):
    mask = torch.arange(7) < 5 if masked else torch.ones(7, dtype=torch.bool)
    gates = torch.randn(2, 7, 4).double().softmax(-1)
    weights = torch.rand(2, 7, 4).double().requires_grad_()
    y = torch.randn(4, 2, 3, 5).double()
    D = torch.stack([fill(gates[g], 3, mask) for g in range(2)])

    def output(weights):
        return vr.expert_choice(gates, 3, weights=weights, renormalize=True, mask=mask.expand(2, -1)).combine(y)

    def wanted(weights):
        B = D * weights[..., None]
        return torch.einsum("gtec,egcd->gtd", B / B.sum((2, 3), keepdim=True).clamp(min=1e-300), y)

    assert D.sum((2, 3)).unique().numel() > 2, "tokens get different numbers of slots"
    torch.testing.assert_close(output(weights), wanted(weights))
    got, right = (torch.autograd.grad(f(weights).square().sum(), weights)[0] for f in (output, wanted))
    torch.testing.assert_close(got, right)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.rand(2, 5, 4), 0), {}, ValueError, "capacity.*>= 1.* 0"),
        ((torch.rand(2, 5, 4), True), {}, TypeError, "capacity.*int.*bool"),
        ((torch.rand(5, 4), 2), {}, ValueError, r"gates.*3 axes.*\[5, 4\]"),
        ((torch.rand(2, 5, 0), 2), {}, ValueError, r"gates.*expert.*\[2, 5, 0\]"),
        ((torch.ones(2, 5, 4).bool(), 2), {}, TypeError, "gates.*float.*bool"),
        ((None, 2), {}, TypeError, "gates.*Tensor.*NoneType"),
        (
            (torch.rand(2, 5, 4), 2),
            {"weights": torch.rand(2, 5, 1)},
            ValueError,
            r"weights.*\[2, 5, 4\].*\[2, 5, 1\]",
        ),
        (
            (torch.rand(2, 5, 4), 2),
            {"weights": torch.rand(2, 5, 4, device="meta")},
            ValueError,
            "weights.*meta.*cpu",
        ),
        (
            (torch.rand(2, 5, 4), 2),
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            ValueError,
            r"mask.*\[2, 5\].*\[2, 4\]",
        ),
        ((torch.rand(2, 5, 4), 2), {"mask": torch.ones(2, 5)}, TypeError, "mask.*bool.*float32"),
        (
            (torch.rand(2, 5, 4), 2),
            {"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
            ValueError,
            "mask.*meta.*cpu",
        ),
        ((torch.rand(2, 5, 4), 2), {"renormalize": 1}, TypeError, "renormalize.*bool.*int"),
    ],
)
def test_refusals(arguments, options, error, words):
    with pytest.raises(error, match=f"^expert_choice: {words}"):
        vr.expert_choice(*arguments, **options)
