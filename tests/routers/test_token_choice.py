"""Token Choice against a queue in plain Python: the experts that tokens choose, and the slots that they get."""

import math

import pytest
import torch

import vmoe_routers as vr


def rank(values):
    """Returns indices from the largest value to the smallest, ties by index."""
    values = [float(v) for v in values]
    return sorted(range(len(values)), key=lambda i: (-values[i], i))


def fill(select, top_k, slots, *, batch_priority=False, mask=None):
    """Returns the dense dispatch tensor [T, E, C] of one group, built request by request."""
    T, E = select.shape
    D = torch.zeros(T, E, slots, dtype=torch.float64)
    used = [0] * E
    order = rank(select.max(-1).values) if batch_priority else range(T)
    for choice in range(top_k):
        for t in order:
            if mask is not None and not mask[t]:
                continue
            e = rank(select[t])[choice]
            if used[e] < slots:
                D[t, e, used[e]] = 1
                used[e] += 1
    return D


def sinkhorn(logits, iterations=20, epsilon=1.0):
    """Computes Sinkhorn without logarithms: scales columns, then rows, from potentials of 0."""
    plan = (logits.double() / epsilon).exp()
    T, E = plan.shape[-2:]
    for _ in range(iterations):
        plan = plan * (T / E) / plan.sum(-2, keepdim=True)
        plan = plan / plan.sum(-1, keepdim=True)
    return plan


@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("slots", [1, 2, 3, 12])
@pytest.mark.parametrize("masked", [False, True])
def test_buffers_fill_in_order(slots, top_k, batch_priority, masked):
    G, T, E = 4, 12, 5
    gates = torch.randn(G, T, E).double().softmax(-1)
    gates[1] = gates[1, 0]  # every token has the same gates
    gates[2] = (gates[2] * 4).round() / 4  # many ties
    weights = torch.rand(G, T, E).double()
    mask = torch.rand(G, T) > 0.3 if masked else None
    routing = vr.token_choice(gates, top_k, slots, batch_priority=batch_priority, weights=weights, mask=mask)
    wanted = torch.stack(
        [
            fill(
                gates[g],
                top_k,
                slots,
                batch_priority=batch_priority,
                mask=mask[g] if masked else None,
            )
            for g in range(G)
        ]
    )
    assert torch.equal(routing.dispatch_tensor(), wanted)
    assert torch.equal(routing.combine_tensor(), wanted * weights[..., None])


@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_never_more_than_capacity_and_top_k(slots, top_k, batch_priority):
    gates = torch.randn(6, 20, 4).softmax(-1)
    D = vr.token_choice(gates, top_k, slots, batch_priority=batch_priority).dispatch_tensor()
    assert set(D.unique().tolist()) <= {0.0, 1.0}
    assert D.sum(1).max() <= 1, "a slot holds at most one token"
    assert D.sum((1, 3)).max() <= slots
    assert D.sum((2, 3)).max() <= top_k
    assert D.sum(3).max() <= 1, "a token is at most once in an expert"
    # A request is dropped only if the buffer is full.
    asked = torch.zeros_like(gates).scatter(2, gates.topk(top_k).indices, 1)
    assert torch.equal(D.sum((1, 3)), asked.sum(1).clamp(max=slots))


def test_batch_priority_drops_the_lowest_priorities():
    gates = torch.randn(8, 40, 4).softmax(-1)
    priority, choice = gates.max(-1)
    kept = vr.token_choice(gates, 1, 4, batch_priority=True).dispatch_tensor().sum((2, 3)) > 0
    dropped = 0
    for g in range(8):
        for e in range(4):
            mine = choice[g] == e
            if (mine & ~kept[g]).any():
                dropped += 1
                assert priority[g][mine & kept[g]].min() >= priority[g][mine & ~kept[g]].max()
    assert dropped > 16
    first = vr.token_choice(gates, 1, 4).dispatch_tensor().sum((2, 3)) > 0
    assert (first != kept).any(), "without batch priority, tokens are served by index"


def test_first_choices_are_served_before_second_choices():
    # Expert 0 is the second choice of the first token and the first choice of the later token.
    gates = torch.tensor([[[0.4, 0.6], [0.9, 0.1]]])
    D = vr.token_choice(gates, 2, 1).dispatch_tensor()[0, :, :, 0]
    assert D.tolist() == [[0, 1], [1, 0]]
    # The first choice is served first, also if the other token has the higher priority.
    gates = torch.tensor([[[0.1, 0.9], [0.6, 0.4]]])
    D = vr.token_choice(gates, 2, 1, batch_priority=True).dispatch_tensor()[0, :, :, 0]
    assert D.tolist() == [[0, 1], [1, 0]]


def test_a_dropped_choice_does_not_change_other_weights():
    gates = torch.tensor([[[0.7, 0.3], [0.6, 0.4]]])
    B = vr.token_choice(gates, 2, 1).combine_tensor()[0].sum(-1)
    torch.testing.assert_close(B, torch.tensor([[0.7, 0.3], [0.0, 0.0]]))
    B = vr.token_choice(gates, 1, 4).combine_tensor()[0].sum(-1)
    torch.testing.assert_close(B, torch.tensor([[0.7, 0.0], [0.6, 0.0]]))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_renormalize_divides_by_the_weights_of_all_requests(top_k):
    gates = torch.randn(3, 9, 4).double().softmax(-1)
    weights = torch.rand(3, 9, 4).double()
    routing = vr.token_choice(gates, top_k, 2, weights=weights, renormalize=True)
    D = torch.stack([fill(gates[g], top_k, 2) for g in range(3)])
    wanted = torch.zeros_like(D)
    for g in range(3):
        for t in range(9):
            total = sum(weights[g, t, e] for e in rank(gates[g, t])[:top_k])
            wanted[g, t] = D[g, t] * weights[g, t, :, None] / total
    torch.testing.assert_close(routing.combine_tensor(), wanted)


@pytest.mark.parametrize("batch_priority", [False, True])
def test_ties_go_to_the_lower_index(batch_priority):
    D = vr.token_choice(torch.full((2, 6, 4), 0.25), 2, 3, batch_priority=batch_priority).dispatch_tensor()
    wanted = torch.zeros(6, 4, 3)
    for t in range(3):  # the first three tokens fill experts 0 and 1
        wanted[t, 0, t] = wanted[t, 1, t] = 1
    assert torch.equal(D, wanted.expand(2, -1, -1, -1))


@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ids_are_unique_and_in_range_for_any_gates(bad, batch_priority):
    gates = torch.randn(3, 8, 5).softmax(-1)
    clean = vr.token_choice(gates, 3, 8, batch_priority=batch_priority)
    gates[1, 2] = bad
    gates[1, 5, 3] = bad
    gates[2] = bad
    routing = vr.token_choice(gates, 3, 8, batch_priority=batch_priority)
    D = routing.dispatch_tensor()
    assert D.sum(1).max() <= 1
    assert D.sum(3).max() <= 1
    assert torch.equal(D[0], clean.dispatch_tensor()[0]), "another group is as it was"
    if bad == -math.inf:
        assert D[1, 2].sum() == D[2].sum() == 0, "a gate of -inf is never asked for"
        assert D[1, 5, 3].sum() == 0
    else:
        assert (D.sum((2, 3)) == 3).all()
        assert D[1, 5, 3].sum() == 1, "a NaN counts as the largest"


def test_minus_inf_leaves_fewer_choices():
    gates = torch.tensor([[[0.5, -math.inf, 0.2], [-math.inf, -math.inf, 0.9]]])
    B = vr.token_choice(gates, 2, 2).combine_tensor().sum(-1)
    assert B.tolist() == torch.tensor([[[0.5, 0, 0.2], [0, 0, 0.9]]]).tolist()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 1, 3), (2, 1, 40)])
def test_small_groups(shape):
    gates = torch.randn(shape).softmax(-1).requires_grad_()
    routing = vr.token_choice(gates, 2, 4)
    x = torch.randn(*shape[:2], 6, requires_grad=True)
    out = routing.combine(routing.dispatch(x))
    best = gates.topk(2).values.sum(-1, keepdim=True)
    torch.testing.assert_close(out, best * x)  # nothing is dropped
    out.sum().backward()
    assert x.grad.shape == x.shape


def test_gates_that_only_select_get_no_gradient():
    gates = torch.rand(2, 6, 3, requires_grad=True)
    weights = torch.rand(2, 6, 3, requires_grad=True)
    B = vr.token_choice(gates, 2, 2, weights=weights).combine_tensor()
    B.sum().backward()
    assert gates.grad is None
    assert torch.equal(weights.grad, (B != 0).any(-1).float())


# The routers


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "combine"),
    [
        ("softmax_token_choice", None),
        ("sinkhorn_token_choice", "softmax"),
        ("sinkhorn_token_choice", "plan"),
    ],
)
def test_routers(name, combine, top_k, batch_priority, training):
    G, T, D, E = 3, 14, 6, 4
    options = {} if combine is None else {"combine": combine}
    router = vr.create_router(
        name,
        D,
        E,
        top_k=top_k,
        batch_priority=batch_priority,
        capacity_factor=0.7,
        noise_std=3.0,
        dtype=torch.float64,
        **options,
    ).train(training)
    noise = torch.randn(G, T, E).double()
    router.draw_noise = lambda logits: noise
    x = torch.randn(G, T, D).double()
    logits = torch.einsum("gtd,ed->gte", x, router.weight.detach())
    noisy = logits + 3.0 / E * noise if training else logits
    if name == "softmax_token_choice":
        select = weigh = noisy.softmax(-1)
    else:
        select = sinkhorn(noisy)
        weigh = select if combine == "plan" else logits.softmax(-1)
    slots = math.ceil(T * top_k * 0.7 / E)
    slots += -slots % 4
    wanted = torch.stack([fill(select[g], top_k, slots, batch_priority=batch_priority) for g in range(G)])
    routing = router(x)
    assert torch.equal(routing.dispatch_tensor(), wanted)
    torch.testing.assert_close(routing.combine_tensor(), wanted * weigh[..., None], atol=1e-12, rtol=0)


def test_sinkhorn_options():
    x = torch.randn(2, 10, 5).double()
    make = vr.create_router
    for options in ({"iterations": 3}, {"epsilon": 0.5}, {"iterations": 1, "epsilon": 2.0}):
        router = make("sinkhorn_token_choice", 5, 4, combine="plan", dtype=torch.float64, **options).eval()
        logits = torch.einsum("gtd,ed->gte", x, router.weight.detach())
        plan = sinkhorn(logits, **options)
        torch.testing.assert_close(router(x).weights.detach(), plan, atol=1e-12, rtol=0)
    many = make(
        "sinkhorn_token_choice",
        5,
        4,
        combine="plan",
        iterations=500,
        tolerance=1e-9,
        dtype=torch.float64,
    ).eval()
    plan = many(x).weights
    torch.testing.assert_close(plan.sum(1), torch.full((2, 4), 2.5).double(), atol=1e-8, rtol=0)


@pytest.mark.parametrize("name", ["softmax_token_choice", "sinkhorn_token_choice"])
def test_batch_priority_makes_routing_equivariant(name):
    router = (
        vr.create_router(name, 6, 4, batch_priority=True, capacity_factor=0.5, capacity_multiple_of=1).double().eval()
    )
    x = torch.randn(2, 16, 6).double()
    order = torch.randperm(16)
    out = router(x).combine_tensor().sum(-1)
    permuted = router(x[:, order]).combine_tensor().sum(-1)
    torch.testing.assert_close(permuted, out[:, order], atol=1e-12, rtol=0)
    assert (out.sum(-1) == 0).any(), "no token was dropped, so the test shows nothing"


@pytest.mark.parametrize("options", [{}, {"capacity_multiple_of": 1}, {"capacity_rounding": "round"}])
@pytest.mark.parametrize("top_k", [1, 2])
def test_capacity_of_the_router(top_k, options):
    router = vr.create_router(
        "softmax_token_choice",
        4,
        6,
        top_k=top_k,
        capacity_factor=1.1,
        eval_capacity_factor=2.3,
        **options,
    )
    for tokens in (1, 5, 49):
        x = torch.randn(2, tokens, 4)
        for training, factor in ((True, 1.1), (False, 2.3)):
            exact = tokens * top_k * factor / 6
            nearest = options.get("capacity_rounding") == "round"
            slots = max(1, round(exact) if nearest else math.ceil(exact))
            if options.get("capacity_multiple_of") != 1:
                slots += -slots % 4
            assert router.train(training)(x).capacity == slots


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((torch.rand(2, 5, 4), 0, 2), {}, ValueError, r"top_k.*\[1, 4\].* 0"),
        ((torch.rand(2, 5, 4), 5, 2), {}, ValueError, r"top_k.*\[1, 4\].* 5"),
        ((torch.rand(2, 5, 4), 1.0, 2), {}, TypeError, "top_k.*int.*float"),
        ((torch.rand(2, 5, 4), 1, 0), {}, ValueError, "capacity.*>= 1.* 0"),
        ((torch.rand(2, 5, 4), 1, 2.0), {}, TypeError, "capacity.*int.*float"),
        ((torch.rand(5, 4), 1, 2), {}, ValueError, r"gates.*3 axes.*\[5, 4\]"),
        ((torch.rand(2, 5, 0), 1, 2), {}, ValueError, r"gates.*expert.*\[2, 5, 0\]"),
        ((torch.ones(2, 5, 4).int(), 1, 2), {}, TypeError, "gates.*float.*int32"),
        (([[1.0]], 1, 2), {}, TypeError, "gates.*Tensor.*list"),
        (
            (torch.rand(2, 5, 4), 1, 2),
            {"weights": torch.rand(1, 5, 4)},
            ValueError,
            r"weights.*\[2, 5, 4\].*\[1, 5, 4\]",
        ),
        (
            (torch.rand(2, 5, 4), 1, 2),
            {"weights": torch.ones(2, 5, 4).long()},
            TypeError,
            "weights.*float.*int64",
        ),
        ((torch.rand(2, 5, 4), 1, 2), {"weights": 1.0}, TypeError, "weights.*Tensor.*float"),
        (
            (torch.rand(2, 5, 4), 1, 2),
            {"weights": torch.rand(2, 5, 4, device="meta")},
            ValueError,
            "weights.*meta.*cpu",
        ),
        (
            (torch.rand(2, 5, 4), 1, 2),
            {"mask": torch.ones(1, 5, dtype=torch.bool)},
            ValueError,
            r"mask.*\[2, 5\].*\[1, 5\]",
        ),
        (
            (torch.rand(2, 5, 4), 1, 2),
            {"mask": torch.ones(2, 5, dtype=torch.int)},
            TypeError,
            "mask.*bool.*int32",
        ),
        ((torch.rand(2, 5, 4), 1, 2), {"mask": [True]}, TypeError, "mask.*Tensor.*list"),
        (
            (torch.rand(2, 5, 4), 1, 2),
            {"mask": torch.ones(2, 5, dtype=torch.bool, device="meta")},
            ValueError,
            "mask.*meta.*cpu",
        ),
    ],
)
def test_refusals(arguments, options, error, words):
    with pytest.raises(error, match=f"^token_choice: {words}"):
        vr.token_choice(*arguments, **options)
