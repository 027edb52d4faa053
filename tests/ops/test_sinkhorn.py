from __future__ import annotations

import pytest
import torch
from checks import (
    DTYPES,
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
    tied,
    with_threads,
)
from torch import Tensor

from vmoe_routers.ops import reference, sinkhorn

OP = "sinkhorn"
each_gradient = pytest.mark.parametrize("gradient", ["unrolled", "implicit"])

SHAPES = [
    # G, T, E
    (2, 12, 4),
    (1, 1, 1),
    (2, 1, 5),
    (2, 6, 1),
    (3, 3, 8),  # E > T
    (8, 98, 16),
]


def masks(G: int, T: int) -> Tensor:
    mask = torch.rand(G, T) < 0.7
    mask[:, 0] = True
    return mask


@each_dtype
@each_gradient
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(device, dtype, gradient, shape):
    check_reference(sinkhorn, reference.sinkhorn, [spread(*shape)], dtype, device, gradient=gradient)


@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_thousands_of_experts(device, tokens):
    """With 4096 experts, entries have the same relative error as with few experts."""
    logits = spread(1, tokens, 4096, scale=1.0).float()
    plan = reference.sinkhorn(logits.double())
    assert ((sinkhorn(logits.to(device)).cpu() - plan).abs() <= 3e-6 * plan).all()


@each_gradient
@pytest.mark.parametrize("epsilon", [0.2, 3.0])
@pytest.mark.parametrize("iterations", [1, 2, 50])
def test_options(device, gradient, epsilon, iterations):
    for dtype in (torch.float32, torch.float64):
        options = {
            "gradient": gradient,
            "epsilon": epsilon,
            "iterations": iterations,
            "mask": masks(2, 12),
        }
        # The implicit gradient starts from the rounded plan, and its system amplifies the rounding.
        slack = 100 if gradient == "implicit" and epsilon < 1 else 1
        check_reference(
            sinkhorn,
            reference.sinkhorn,
            [spread(2, 12, 4)],
            dtype,
            device,
            gradient_slack=slack,
            **options,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_gradient
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3])
def test_tolerance(device, dtype, gradient, tolerance):
    logits = spread(4, 30, 6, scale=1.0) * torch.tensor([0.1, 0.5, 1.0, 2.0])[:, None, None]
    options = {"gradient": gradient, "tolerance": tolerance, "iterations": 40}
    check_reference(sinkhorn, reference.sinkhorn, [logits], dtype, device, **options)

    x = logits.to(device, dtype)
    _, error, iterations = sinkhorn(x, return_error=True, **options)
    _, wanted_error, wanted_iterations = reference.sinkhorn(x, return_error=True, **options)
    assert torch.equal(iterations, wanted_iterations)
    assert iterations.dtype == torch.int32
    assert len(set(iterations.tolist())) > 1, "the groups are meant to stop at different times"
    assert_close(error, wanted_error, slack=10, dtype=torch.float32)
    assert (error <= tolerance).all()
    # One iteration fewer does not reach the tolerance.
    for g in range(4):
        if iterations[g] > 1:
            options["iterations"] = int(iterations[g]) - 1
            assert (sinkhorn(x[g : g + 1], return_error=True, **options)[1] > tolerance).all()


def test_error_is_the_error_of_the_column_sums(device):
    logits = spread(3, 20, 5).to(device)
    plan, error, iterations = sinkhorn(logits, iterations=4, return_error=True)
    assert_close(error, (plan.sum(1) - 20 / 5).abs().amax(1) / (20 / 5))
    assert iterations.tolist() == [4, 4, 4]


def test_only_the_plan_has_a_gradient(device):
    logits = spread(2, 20, 5).to(device).requires_grad_()
    plan, error, iterations = sinkhorn(logits, return_error=True)
    assert plan.requires_grad
    assert not error.requires_grad
    assert not iterations.requires_grad


def test_iterations_run_out(device):
    _, error, iterations = sinkhorn(spread(2, 20, 5).to(device), iterations=3, tolerance=1e-12, return_error=True)
    assert (error > 1e-12).all()
    assert iterations.tolist() == [3, 3]


def test_gradient_unrolled():
    check_gradient(sinkhorn, [spread(2, 5, 3)], iterations=3)
    check_gradient(sinkhorn, [spread(2, 5, 3)], iterations=3, epsilon=0.5, mask=masks(2, 5))


def test_gradient_implicit():
    """The implicit gradient is the derivative of the fixed point, which converged iterations have, too."""
    options = {"iterations": 400, "gradient": "implicit"}
    check_gradient(sinkhorn, [spread(2, 5, 3, scale=1.0)], **options)
    check_gradient(sinkhorn, [spread(2, 5, 3, scale=1.0)], epsilon=0.5, mask=masks(2, 5), **options)


def test_gradients_agree_at_convergence(device):
    logits = spread(2, 12, 4, scale=1.0).to(device).requires_grad_()
    cotangent = torch.randn_like(logits)
    unrolled, implicit = (
        torch.autograd.grad(sinkhorn(logits, iterations=500, gradient=gradient), logits, cotangent)[0]
        for gradient in ("unrolled", "implicit")
    )
    assert_close(unrolled, implicit)


@each_gradient
def test_gradient_of_a_plan_in_blocks(device, gradient):
    """If experts share no token, the null space of the implicit gradient's system has several dimensions."""
    logits = torch.full((1, 6, 4), -1e4, dtype=torch.float64)
    logits[:, :3, :2] = spread(1, 3, 2, scale=1.0)
    logits[:, 3:, 2:] = spread(1, 3, 2, scale=1.0)
    check_reference(sinkhorn, reference.sinkhorn, [logits], torch.float64, device, gradient=gradient)


@each_gradient
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_logits(device, dtype, gradient):
    """With |logits| up to 1e4 the plan is exact to the rounding of the dtype, without overflow."""
    logits = torch.rand(2, 16, 4, dtype=torch.float64) * 2e4 - 1e4
    check_reference(sinkhorn, reference.sinkhorn, [logits], dtype, device, gradient=gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_offset_of_an_expert_changes_nothing(device, dtype):
    """The first column update removes an offset of any size."""
    logits = torch.randint(-3, 4, (2, 16, 4)).to(device, dtype)
    offset = torch.tensor([8192.0, -8192.0, 512.0, 0.0], dtype=dtype, device=device)
    assert_close(sinkhorn(logits + offset), sinkhorn(logits))


@pytest.mark.parametrize("tolerance", [0.0, 1e-2])
@pytest.mark.parametrize("implicit", [False, True])
def test_dispatcher(device, tolerance, implicit):
    logits = spread(2, 5, 3).to(device).requires_grad_()
    check_dispatcher(torch.ops.vmoe_routers.sinkhorn.default, [logits, 1.0, 4, tolerance, implicit])


@each_gradient
def test_compile(device, gradient):
    check_compile(sinkhorn, [spread(2, 5, 3)], device, gradient=gradient, iterations=4)
    check_compile(
        sinkhorn,
        [spread(2, 5, 3)],
        device,
        gradient=gradient,
        tolerance=1e-2,
        mask=masks(2, 5).to(device),
        return_error=True,
    )


# -- properties of a plan


@each_dtype
def test_rows_sum_to_one(device, dtype):
    plan = sinkhorn(spread(3, 40, 8).to(device, dtype), iterations=2)
    assert plan.dtype == dtype
    assert (plan >= 0).all()
    assert_close(plan.double().sum(2), torch.ones(3, 40), dtype=dtype, slack=2)


def test_columns_tend_to_their_share(device):
    logits = spread(3, 40, 8, scale=1.0).to(device)
    errors = [sinkhorn(logits, iterations=i, return_error=True)[1].max().item() for i in (1, 5, 25, 400)]
    assert errors[:3] == sorted(errors[:3], reverse=True)
    assert errors[-1] < 1e-10


@pytest.mark.parametrize("epsilon", [0.5, 1.0])
def test_is_a_softmax_with_one_bias_per_expert(device, epsilon):
    M = spread(3, 20, 6).to(device) / epsilon
    plan = sinkhorn(M * epsilon, epsilon=epsilon)
    h = plan.log() - M
    h = (h - h.mean(2, keepdim=True)).mean(1, keepdim=True)
    assert_close(plan, (M + h).softmax(2), slack=10)


@pytest.mark.parametrize("value", [0.0, -7.0, 1e4])
def test_equal_logits(device, value):
    plan = sinkhorn(torch.full((2, 9, 4), value, device=device))
    assert_close(plan, torch.full((2, 9, 4), 0.25))


def test_permutations(device):
    logits = spread(2, 20, 6).to(device)
    tokens, experts = torch.randperm(20), torch.randperm(6)
    plan = sinkhorn(logits)
    assert_close(sinkhorn(logits[:, tokens]), plan[:, tokens])
    assert_close(sinkhorn(logits[:, :, experts]), plan[:, :, experts])


def test_groups_do_not_affect_each_other(device):
    logits = spread(64, 20, 6).float().to(device)
    together = sinkhorn(logits)
    assert all(torch.equal(together[g : g + 1], sinkhorn(logits[g : g + 1])) for g in (0, 31, 63))
    logits[3] = NAN
    poisoned = sinkhorn(logits)
    assert poisoned[3].isnan().all()
    others = torch.arange(64) != 3
    assert torch.equal(poisoned[others], together[others])


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("gradient", ["unrolled", "implicit"])
@pytest.mark.parametrize("shape", [(1, 3000, 32), (40, 49, 8)])
def test_does_not_depend_on_threads(gradient, shape):
    logits = torch.randn(shape, requires_grad=True)

    def run():
        plan = sinkhorn(logits, gradient=gradient)
        return plan.detach(), *torch.autograd.grad(plan, logits, logits.detach())

    first, *others = with_threads(run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


def test_ties_stay_ties(device):
    logits = tied(2, 20, 4).float().to(device)
    logits[:, 10:] = logits[:, :10]
    plan = sinkhorn(logits)
    assert torch.equal(plan[:, 10:], plan[:, :10])


# -- edge cases


@each_gradient
@pytest.mark.parametrize("masked_by", ["mask", "-inf"])
def test_masked_tokens_equal_removed_tokens(device, gradient, masked_by):
    logits, mask = spread(3, 10, 4), masks(3, 10)
    x = logits.clone() if masked_by == "mask" else logits.masked_fill(~mask[..., None], -INF)
    x = x.to(device).requires_grad_()
    plan, error, _ = sinkhorn(
        x,
        mask=mask.to(device) if masked_by == "mask" else None,
        gradient=gradient,
        return_error=True,
    )
    cotangent = torch.randn_like(plan)
    plan.backward(cotangent)
    assert (plan[~mask] == 0).all()
    assert (x.grad[~mask] == 0).all()
    for g in range(3):
        present = logits[g : g + 1, mask[g]].to(device).requires_grad_()
        wanted, wanted_error, _ = sinkhorn(present, gradient=gradient, return_error=True)
        assert_close(plan[g, mask[g]], wanted[0])
        assert_close(error[g : g + 1], wanted_error, slack=1e3)
        wanted.backward(cotangent[g : g + 1, mask[g]])
        assert_close(x.grad[g, mask[g]], present.grad[0])


@each_gradient
@pytest.mark.parametrize("masked_by", ["mask", "-inf"])
def test_group_without_any_token(device, gradient, masked_by):
    logits, mask = (
        spread(2, 5, 3).to(device),
        torch.tensor([[True] * 5, [False] * 5], device=device),
    )
    x = logits.clone() if masked_by == "mask" else logits.masked_fill(~mask[..., None], -INF)
    x.requires_grad_()
    plan, error, _ = sinkhorn(x, mask=mask if masked_by == "mask" else None, gradient=gradient, return_error=True)
    assert (plan[1] == 0).all()
    assert error[1] == 0
    plan.sum().backward()
    assert (x.grad[1] == 0).all()
    assert x.grad.isfinite().all()
    assert_close(plan[:1], sinkhorn(logits[:1]))


@each_gradient
def test_masked_pairs(device, gradient):
    """Single -inf entries, and an expert that is masked for every token, have a plan of 0 and no gradient."""
    logits = spread(2, 8, 4)
    logits[0, torch.arange(8), torch.arange(8) % 4] = -INF
    logits[1, :, 2] = -INF
    check_reference(
        sinkhorn,
        reference.sinkhorn,
        [logits],
        torch.float64,
        device,
        gradient=gradient,
        iterations=10,
    )
    x = logits.float().to(device).requires_grad_()
    plan, error, _ = sinkhorn(x, gradient=gradient, iterations=10, return_error=True)
    assert (plan[logits.isneginf()] == 0).all()
    assert_close(plan.sum(2), torch.ones(2, 8))
    assert error[1] >= 1 - 1e-6
    plan.square().sum().backward()
    assert (x.grad[logits.isneginf()] == 0).all()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_is_not_hidden(device, value):
    logits = spread(2, 8, 4).to(device)
    logits[1, 3, 2] = value
    plan, error, _ = sinkhorn(logits, return_error=True)
    assert plan[1].isnan().all()
    assert error[1].isnan()
    assert plan[0].isfinite().all()


@each_gradient
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_is_not_hidden_in_the_gradient(device, gradient, value):
    logits = spread(2, 8, 4).to(device)
    logits[1, 3, 2] = value
    logits.requires_grad_()
    sinkhorn(logits, gradient=gradient).square().sum().backward()
    assert logits.grad[1].isnan().all()
    assert logits.grad[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e10, 1e15, 1e30])
def test_rows_of_large_ties_sum_to_one(device, dtype, size):
    tokens = torch.where(torch.arange(6)[:, None] < 3, size, 0.0).expand(6, 3)
    experts = torch.where(torch.arange(3)[None] < 1, size, 0.0).expand(6, 3)
    logits = torch.stack([torch.full((6, 3), size), tokens, experts]).to(device, dtype)
    plan, error, _ = sinkhorn(logits, return_error=True)
    assert_close(plan.sum(2), torch.ones(3, 6))
    assert (error[:2] <= 1e-6).all()  # the third group's potentials have the rounding error of its large logits


def test_logits_that_overflow_are_nan(device):
    logits = torch.tensor([[[1e308, 0.0]], [[1.0, 0.0]]], dtype=torch.float64, device=device)
    plan = sinkhorn(logits, epsilon=0.01)
    assert plan[0].isnan().all()
    assert plan[1].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e3])
def test_steps_of_any_value(device, scale):
    """The raw gradient clamps a caller's steps to the number of iterations."""
    logits, grad = (spread(2, 6, 3, scale=scale).to(device) for _ in range(2))
    ops = torch.ops.vmoe_routers
    _, history, _, _ = ops.sinkhorn(logits, 1.0, 4, 0.0, False)

    def gradient(*steps: int) -> Tensor:
        return ops.sinkhorn_backward(grad, logits, history, torch.tensor(steps, dtype=torch.int32, device=device), 1.0)

    most = torch.iinfo(torch.int32).max
    assert torch.equal(gradient(4, 4), gradient(10**6, most))
    assert torch.equal(gradient(0, 0), gradient(-1, -most))


@each_gradient
@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
def test_empty(device, gradient, shape):
    logits = torch.zeros(shape, device=device, requires_grad=True)
    plan, error, iterations = sinkhorn(logits, gradient=gradient, return_error=True)
    assert plan.shape == shape
    assert error.shape == iterations.shape == shape[:1]
    plan.sum().backward()
    assert logits.grad.shape == shape


@each_gradient
def test_not_contiguous(device, gradient):
    logits = spread(2, 10, 4).to(device)
    cotangent = torch.randn_like(logits)
    wanted = None
    for view in (logits, strided(logits), logits.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        leaf = view.detach().requires_grad_()
        plan = sinkhorn(leaf, gradient=gradient)
        plan.backward(strided(cotangent))
        wanted = wanted or (plan, leaf.grad)
        assert torch.equal(plan, wanted[0])
        assert torch.equal(leaf.grad, wanted[1])


def test_refuses():
    logits = torch.randn(2, 5, 3)
    with refused(OP, "logits"):
        sinkhorn(logits[0])
    with refused(OP, "logits"):
        sinkhorn(logits.long())
    with refused(OP, "logits"):
        sinkhorn(logits.tolist())
    for epsilon in (0.0, -1.0, NAN, INF, None, "1"):
        with refused(OP, "epsilon"):
            sinkhorn(logits, epsilon=epsilon)
    for iterations in (0, -1, 2.5, None):
        with refused(OP, "iterations"):
            sinkhorn(logits, iterations=iterations)
    for tolerance in (0.0, -1.0, NAN, "1"):
        with refused(OP, "tolerance"):
            sinkhorn(logits, tolerance=tolerance)
    for gradient in ("none", None):
        with refused(OP, "gradient"):
            sinkhorn(logits, gradient=gradient)
    true = torch.ones(2, 5, dtype=torch.bool)
    for mask in (true[:1], true[..., None], true.float(), true.tolist(), true.to("meta")):
        with refused(OP, "mask"):
            sinkhorn(logits, mask=mask)
