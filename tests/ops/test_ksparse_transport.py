from __future__ import annotations

import pytest
import torch
from checks import (
    INF,
    NAN,
    assert_close,
    check_compile,
    check_dispatcher,
    check_gradient,
    check_reference,
    each_dtype,
    refused,
    spread,
    strided,
    with_threads,
)
from torch import Tensor

from vmoe_routers.ops import ksparse_transport, reference

OP = "ksparse_transport"

SHAPES = [
    # G, T, E, k
    (2, 12, 4, 3),
    (1, 1, 1, 1),
    (2, 1, 5, 1),
    (2, 6, 1, 6),
    (3, 3, 8, 1),  # E > T
    (2, 10, 4, 10),  # k = T
    (4, 98, 16, 12),
]


def similarities(G: int, T: int, E: int, *, scale: float = 1.5) -> Tensor:
    """Returns similarities as the router passes them: a softmax over the experts."""
    return spread(G, T, E, scale=scale).softmax(2)


@each_dtype
@pytest.mark.parametrize("G, T, E, k", SHAPES)
def test_reference(device, dtype, G, T, E, k):
    # Adam divides by the size of the gradient, so rounding errors grow over the iterations.
    check_reference(
        ksparse_transport,
        reference.ksparse_transport,
        [similarities(G, T, E), k],
        dtype,
        device,
        slack=10,
        gradient_slack=10,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"iterations": 1},
        {"iterations": 200},
        {"iterations": 100, "learning_rate": 0.1},
        {"gamma": 0.1},
        {"gamma": 5.0, "iterations": 5},
        {"mask": torch.tensor([[True] * 9 + [False] * 3, [False, True] * 6])},
    ],
    ids=lambda options: " ".join(options),
)
def test_options(device, dtype, options):
    check_reference(
        ksparse_transport,
        reference.ksparse_transport,
        [similarities(2, 12, 4), 4],
        dtype,
        device,
        slack=100,
        **options,
    )


def test_a_group_stops_by_itself_after_the_update(device):
    """Group 0 has converged at the start, and group 1 has not. A large tolerance stops after one update."""
    similarity = similarities(2, 12, 3)
    similarity[0] = torch.eye(3).double().repeat(4, 1)
    similarity = similarity.to(device)
    options = {"iterations": 50, "learning_rate": 0.05}
    plan = ksparse_transport(similarity, 4, **options)
    assert_close(plan[0], similarity[0])
    assert_close(plan, reference.ksparse_transport(similarity, 4, **options), slack=10)
    loose = ksparse_transport(similarity, 4, tolerance=1e9, **options)
    assert_close(loose, ksparse_transport(similarity, 4, iterations=1, learning_rate=0.05))
    assert not torch.equal(loose[1], plan[1])
    for g in range(2):
        assert torch.equal(ksparse_transport(similarity[g : g + 1], 4, **options), plan[g : g + 1])


def test_gradient():
    """The gradient treats alpha as constant, so finite differences are taken of the plan at alpha = 0."""
    check_gradient(ksparse_transport, [similarities(2, 6, 3), 4], iterations=0)
    mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
    check_gradient(ksparse_transport, [similarities(2, 6, 3), 4], iterations=0, gamma=0.5, mask=mask)


def test_dispatcher(device):
    op = torch.ops.vmoe_routers.ksparse_transport.default
    similarity = similarities(2, 6, 3).to(device).requires_grad_()
    check_dispatcher(op, [similarity, 2, 4, "adam", 0.01, 1e-3, 1.0])
    check_dispatcher(op, [similarity, 2, 4, "lbfgs", 0.01, 1e-3, 1.0])


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_compile(device, solver):
    check_compile(ksparse_transport, [similarities(2, 6, 3), 3], device, solver=solver)
    check_compile(
        ksparse_transport,
        [similarities(2, 6, 3), 3],
        device,
        solver=solver,
        mask=torch.rand(2, 6, device=device) < 0.8,
    )


# -- properties of a plan


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.parametrize("k", [1, 5, 10])
@each_dtype
def test_columns(device, dtype, solver, k):
    """After any number of iterations, a column has at most k non-zeros, and its sum is exactly n / E."""
    for iterations in (1, 20):
        plan = ksparse_transport(similarities(3, 40, 8).to(device, dtype), k, solver=solver, iterations=iterations)
        assert plan.dtype == dtype
        assert (plan >= 0).all()
        assert ((plan > 0).sum(1) <= k).all()
        assert_close(plan.double().sum(1), torch.full((3, 8), 5.0), dtype=dtype, slack=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterations_bring_row_sums_to_one(device, dtype):
    similarity = similarities(3, 40, 8).to(device, dtype)
    off = [(ksparse_transport(similarity, 40, iterations=i).sum(2) - 1).norm().item() for i in (0, 20, 200)]
    assert off[1] < 0.8 * off[0]
    assert off[2] < 0.05 * off[0]


def test_permutations(device):
    similarity = similarities(2, 20, 5).to(device)
    tokens, experts = torch.randperm(20), torch.randperm(5)
    plan = ksparse_transport(similarity, 6)
    assert_close(ksparse_transport(similarity[:, tokens], 6), plan[:, tokens], slack=100)
    assert_close(ksparse_transport(similarity[:, :, experts], 6), plan[:, :, experts], slack=100)


def test_groups_do_not_affect_each_other(device):
    similarity = similarities(32, 20, 5).float().to(device)
    together = ksparse_transport(similarity, 4)
    assert all(torch.equal(together[g : g + 1], ksparse_transport(similarity[g : g + 1], 4)) for g in (0, 15, 31))
    similarity[3] = NAN
    others = torch.arange(32) != 3
    assert torch.equal(ksparse_transport(similarity, 4)[others], together[others])


# -- the optimum


@pytest.mark.parametrize("gamma", [0.1, 1.0])
@pytest.mark.parametrize("G, T, E", [(2, 12, 4), (1, 30, 5), (2, 3, 6)])
def test_lbfgs_without_sparsity_is_the_one_optimal_plan(device, G, T, E, gamma):
    """For k = T the semi-dual is smooth, the plan is unique, and its rows sum to 1."""
    similarity = similarities(G, T, E).to(device)
    plan = ksparse_transport(similarity, T, solver="lbfgs", iterations=1000, tolerance=1e-9, gamma=gamma)
    assert (plan.sum(2) - 1).norm(dim=1).max() <= 1e-6
    wanted = reference.ksparse_transport(similarity, T, solver="lbfgs", gamma=gamma)
    torch.testing.assert_close(plan, wanted, rtol=0, atol=1e-6)


def test_lbfgs_is_optimal_if_the_rows_sum_to_one(device):
    """For k < T the semi-dual is not differentiable everywhere, and a solver may stop at such a point. But rows that
    sum to 1 prove the optimum: the plan is feasible, and its cost equals the lower bound of all feasible plans."""
    similarity, k, gamma = similarities(8, 24, 4), 6, 1.0
    plan = ksparse_transport(similarity.to(device), k, solver="lbfgs", iterations=1000, tolerance=1e-8).cpu()
    arrived = (plan.sum(2) - 1).norm(dim=1) <= 1e-7
    assert arrived.any()
    cost = gamma / 2 * plan.square().sum((1, 2)) - (plan * similarity).sum((1, 2))
    alpha = torch.stack([reference._lbfgs(group, k, gamma) for group in similarity])
    bound = reference.ksparse_semi_dual(alpha, similarity, k, gamma)[0]
    assert (cost >= bound - 1e-7)[arrived].all()
    both = arrived & ((reference.ksparse_semi_dual(alpha, similarity, k, gamma)[1]).norm(dim=1) <= 1e-6)
    assert both.any()
    torch.testing.assert_close(cost[both], bound[both], rtol=0, atol=1e-6)


def test_lbfgs_converges_in_fewer_iterations_than_adam(device):
    similarity = similarities(4, 24, 4).to(device)
    adam, lbfgs = (
        (ksparse_transport(similarity, 24, solver=solver, iterations=40).sum(2) - 1).norm(dim=1)
        for solver in ("adam", "lbfgs")
    )
    assert (lbfgs <= 1e-3).all()
    assert (adam > 1e-2).any()


# -- edge cases


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.parametrize("masked_by", ["mask", "-inf"])
def test_masked_tokens_equal_removed_tokens(device, solver, masked_by):
    similarity, mask = similarities(3, 12, 4), torch.rand(3, 12) < 0.7
    mask[0] = torch.arange(12) < 2  # fewer than k
    x = similarity.clone() if masked_by == "mask" else similarity.masked_fill(~mask[..., None], -INF)
    x = x.to(device).requires_grad_()
    plan = ksparse_transport(x, 3, solver=solver, mask=mask.to(device) if masked_by == "mask" else None)
    cotangent = torch.randn_like(plan)
    plan.backward(cotangent)
    assert (plan[~mask] == 0).all()
    assert (x.grad[~mask] == 0).all()
    for g in range(3):
        present = similarity[g : g + 1, mask[g]].to(device).requires_grad_()
        wanted = ksparse_transport(present, min(3, present.shape[1]), solver=solver)
        assert_close(plan[g, mask[g]], wanted[0])
        wanted.backward(cotangent[g : g + 1, mask[g]])
        assert_close(x.grad[g, mask[g]], present.grad[0])


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.parametrize("masked_by", ["mask", "-inf"])
def test_group_without_any_token(device, solver, masked_by):
    similarity = similarities(2, 5, 3).to(device)
    mask = torch.tensor([[True] * 5, [False] * 5], device=device)
    x = similarity.clone() if masked_by == "mask" else similarity.masked_fill(~mask[..., None], -INF)
    x.requires_grad_()
    plan = ksparse_transport(x, 2, solver=solver, mask=mask if masked_by == "mask" else None)
    plan.square().sum().backward()
    assert (plan[1] == 0).all()
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()
    assert_close(plan[:1], ksparse_transport(similarity[:1], 2, solver=solver))


def test_equal_similarities(device):
    """All entries tie, so without an update every expert takes the first k tokens in equal shares."""
    plan = ksparse_transport(torch.full((1, 8, 2), 0.5, device=device), 4, iterations=0)
    wanted = torch.zeros(1, 8, 2)
    wanted[:, :4] = 1.0
    assert_close(plan, wanted)


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_is_not_hidden(device, value):
    similarity = similarities(2, 8, 4).to(device)
    similarity[1, 3, 2] = value
    for solver in ("adam", "lbfgs"):
        plan = ksparse_transport(similarity, 2, solver=solver)
        assert plan[1].isnan().all()
        assert plan[0].isfinite().all()


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_similarities(device, solver, size):
    similarity = (similarities(2, 12, 4) * size).float().to(device)
    plan = ksparse_transport(similarity, 3, solver=solver)
    assert plan.isfinite().all()
    assert ((plan > 0).sum(1) <= 3).all()
    assert_close(plan.sum(1), torch.full((2, 4), 3.0))
    if solver == "adam":
        assert_close(plan, reference.ksparse_transport(similarity.double(), 3), slack=10)


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_no_group(device, solver):
    similarity = torch.zeros(0, 4, 3, device=device, requires_grad=True)
    plan = ksparse_transport(similarity, 2, solver=solver)
    plan.sum().backward()
    assert plan.shape == similarity.grad.shape == (0, 4, 3)


def test_not_contiguous(device):
    similarity = similarities(2, 10, 4).to(device)
    cotangent = torch.randn_like(similarity)
    wanted = None
    for view in (
        similarity,
        strided(similarity),
        similarity.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    ):
        leaf = view.detach().requires_grad_()
        plan = ksparse_transport(leaf, 3)
        plan.backward(strided(cotangent))
        wanted = wanted or (plan, leaf.grad)
        assert torch.equal(plan, wanted[0])
        assert torch.equal(leaf.grad, wanted[1])


def test_refuses():
    similarity = torch.rand(2, 5, 3)
    for wrong in (similarity[0], similarity.long(), similarity.tolist()):
        with refused(OP, "similarity"):
            ksparse_transport(wrong, 1)
    for k in (0, -1, 6, 1.5, None):
        with refused(OP, "k"):
            ksparse_transport(similarity, k)
    for iterations in (-1, 2.5, None):
        with refused(OP, "iterations"):
            ksparse_transport(similarity, 2, iterations=iterations)
    for solver in ("sgd", None):
        with refused(OP, "solver"):
            ksparse_transport(similarity, 2, solver=solver)
    for learning_rate in (0.0, -1.0, NAN, INF, None):
        with refused(OP, "learning_rate"):
            ksparse_transport(similarity, 2, learning_rate=learning_rate)
    for tolerance in (-1.0, NAN, None):
        with refused(OP, "tolerance"):
            ksparse_transport(similarity, 2, tolerance=tolerance)
    for gamma in (0.0, -1.0, NAN, INF, None):
        with refused(OP, "gamma"):
            ksparse_transport(similarity, 2, gamma=gamma)
    true = torch.ones(2, 5, dtype=torch.bool)
    for mask in (true[:1], true[..., None], true.float(), true.tolist(), true.to("meta")):
        with refused(OP, "mask"):
            ksparse_transport(similarity, 2, mask=mask)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
@pytest.mark.parametrize("shape", [(1, 3000, 32), (40, 49, 8)])
def test_does_not_depend_on_threads(solver, shape):
    similarity = torch.rand(shape)
    first, *others = with_threads(lambda: [ksparse_transport(similarity, 6, solver=solver)])
    assert all(torch.equal(other[0], first[0]) for other in others)
