from __future__ import annotations

from functools import partial

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

from vmoe_routers.ops import reference, soft_mix
from vmoe_routers.ops._dtypes import HALF_PRODUCTS

OP = "soft_mix"
HALVES = (torch.bfloat16, torch.float16)
each_dim = pytest.mark.parametrize("dim", [1, 2], ids=["tokens", "slots"])

SHAPES = [
    # G, T, S, D
    (2, 9, 6, 5),
    (1, 1, 1, 1),
    (2, 1, 7, 3),
    (2, 7, 1, 3),
    (3, 2, 20, 4),  # more slots than tokens
    (4, 49, 32, 64),
]


def arguments(G: int, T: int, S: int, D: int, dim: int, E: int = 1) -> list[Tensor | int]:
    tokens, slots = (G, T, D), (E, G, S // E, D)
    return [spread(G, T, S), torch.randn(tokens if dim == 1 else slots, dtype=torch.float64), dim]


def by_group(values: Tensor, groups: int) -> Tensor:
    """Returns tokens [G, T, D] unchanged, and slots of one expert [1, G, S, D] as [G, S, D]."""
    return values.reshape(groups, -1, values.shape[-1])


def multiplied_in_half(device: str, dtype: torch.dtype) -> bool:
    """Tells whether weights are rounded to the values' dtype for products in 16 bits."""
    return device in HALF_PRODUCTS and dtype in HALVES


def check_in_half(logits: Tensor, values: Tensor, dim: int) -> None:
    """Checks 16-bit values: errors are at most an epsilon of the summands. The logits' gradient is as in float32."""
    logits64, values64 = (x.detach().double().cpu().requires_grad_() for x in (logits, values))
    logits, values = logits.detach().requires_grad_(), values.detach().requires_grad_()
    epsilon = torch.finfo(values.dtype).eps

    def assert_within(actual, expected, summed):
        assert actual.dtype == values.dtype
        off = (actual.detach().double().cpu() - expected.detach()).abs()
        assert (off <= epsilon * summed + 1e-5).all()

    out, expected = soft_mix(logits, values, dim), reference.soft_mix(logits64, values64, dim)
    assert_within(out, expected, reference.soft_mix(logits64.detach(), values64.detach().abs(), dim))
    cotangent = torch.randn(expected.shape, dtype=torch.float64).to(out.dtype)
    out.backward(cotangent.to(out.device))
    expected.backward(cotangent.double(), retain_graph=True)
    (summed,) = torch.autograd.grad(expected, values64, cotangent.double().abs())
    assert_within(values.grad, values64.grad, summed)
    assert logits.grad.dtype == logits.dtype
    assert_close(logits.grad, logits64.grad, slack=10)


@each_dtype
@each_dim
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(device, dtype, dim, shape):
    if multiplied_in_half(device, dtype):
        logits, values, _ = arguments(*shape, dim)
        return check_in_half(logits.to(device, dtype), values.to(device, dtype), dim)
    check_reference(
        soft_mix,
        reference.soft_mix,
        arguments(*shape, dim),
        dtype,
        device,
        slack=2,
        gradient_slack=2,
    )


@pytest.mark.parametrize("dtype", HALVES)
@each_dim
def test_logits_of_float32_with_values_in_half(device, dtype, dim):
    """With the dtypes of autocast, the logits are not rounded, and each gradient has the dtype of its tensor."""
    logits, values, _ = arguments(2, 9, 6, 5, dim)
    if multiplied_in_half(device, dtype):
        return check_in_half(logits.to(device).float(), values.to(device, dtype), dim)
    logits, values = (
        logits.to(device).float().requires_grad_(),
        values.to(device, dtype).requires_grad_(),
    )
    logits64, values64 = (
        logits.detach().double().requires_grad_(),
        values.detach().double().requires_grad_(),
    )
    out, expected = soft_mix(logits, values, dim), reference.soft_mix(logits64, values64, dim)
    assert out.dtype == dtype
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    expected.backward(cotangent.double())
    assert (logits.grad.dtype, values.grad.dtype) == (torch.float32, dtype)
    assert_close(logits.grad, logits64.grad, slack=10)
    assert_close(values.grad, values64.grad)


@pytest.mark.parametrize("dtype", HALVES)
@each_dim
@pytest.mark.parametrize("shape", [(2, 9, 6, 5), (3, 49, 196, 64), (2, 300, 44, 8), (1, 5, 1500, 16)])
def test_values_in_half_for_every_product(device, dtype, dim, shape):
    logits, values, _ = arguments(*shape, dim)
    logits[0, 1] = -INF
    logits[0, :, 1] = -INF
    check_in_half(logits.to(device).float(), values.to(device, dtype), dim)


@each_dim
@pytest.mark.parametrize("E", [1, 3])
def test_gradient(dim, E):
    check_gradient(soft_mix, [*arguments(2, 4, 3, 2, dim, E), E])


@each_dim
@pytest.mark.parametrize("wanted", ["logits", "values"])
def test_gradient_of_one_argument_alone(device, dim, wanted):
    logits, values, _ = (a.to(device) if isinstance(a, Tensor) else a for a in arguments(2, 9, 6, 5, dim))
    leaf = {"logits": logits, "values": values}[wanted].requires_grad_()
    actual = torch.autograd.grad(soft_mix(logits, values, dim).square().sum(), leaf)[0]
    expected = torch.autograd.grad(reference.soft_mix(logits, values, dim).square().sum(), leaf)[0]
    assert_close(actual, expected)


@each_dim
@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dispatcher(device, dim, num_experts, dtype):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the op takes 16 bits on CUDA")
    G, T, D, C = 2, 4, 2, 3 // num_experts
    tokens, slots = (G, T, D), (num_experts, G, C, D)
    make = partial(torch.randn, dtype=dtype, device=device)
    logits, values = make(G, T, 3), make(tokens if dim == 1 else slots)
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    grad = make(slots if dim == 1 else tokens)
    backward = [grad, logits, values, dim, num_experts]
    check_dispatcher(torch.ops.vmoe_routers.soft_mix_backward.default, backward)
    forward = [logits.requires_grad_(), values.requires_grad_(), dim, num_experts]
    check_dispatcher(torch.ops.vmoe_routers.soft_mix.default, forward)


@each_dim
def test_compile(device, dim):
    check_compile(soft_mix, arguments(2, 4, 3, 2, dim), device)


# -- slots by expert


@each_dim
@each_dtype
@pytest.mark.parametrize("D", [7, 136])
@pytest.mark.parametrize(("E", "C"), [(3, 4), (1, 5), (5, 1)])
def test_slots_by_expert_are_the_same_slots(device, dtype, dim, E, C, D):
    logits, values, _ = (a.to(device, dtype) if isinstance(a, Tensor) else a for a in arguments(2, 9, E * C, D, dim))

    def run(by_expert):
        a, b = logits.clone().requires_grad_(), values.clone().requires_grad_()
        if by_expert:
            mixed = soft_mix(a, b if dim == 1 else b[0].unflatten(1, (E, C)).transpose(0, 1), dim, E)
            assert mixed.shape == ((E, 2, C, D) if dim == 1 else (2, 9, D))
            out = mixed.transpose(0, 1).flatten(1, 2) if dim == 1 else mixed
        else:
            out = by_group(soft_mix(a, b, dim), 2)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (a, b))

    for a, b in zip(run(True), run(False), strict=True):
        if device in HALF_PRODUCTS:  # torch may choose the product by the strides of the slots
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)


def test_slots_by_expert_are_not_copied(device):
    """Experts are the first axis in memory, too, as the products of the experts need."""
    logits, x = torch.randn(2, 9, 12, device=device), torch.randn(2, 9, 7, device=device)
    assert soft_mix(logits, x, 1, 3).is_contiguous()
    y = torch.randn(3, 2, 4, 7, device=device, requires_grad=True)
    logits.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        soft_mix(logits, y, 2)
    assert {t.data_ptr() for t in kept} == {logits.data_ptr(), y.data_ptr()}


@pytest.mark.cpu_kernels
@each_dim
@pytest.mark.parametrize("G", [1, 5, 40])
def test_does_not_depend_on_threads_or_neighbours(dim, G):
    logits, values, _ = (a.float() if isinstance(a, Tensor) else a for a in arguments(G, 49, 48, 64, dim))
    logits.requires_grad_()
    values.requires_grad_()
    grad = torch.randn_like(soft_mix(logits, values, dim))

    def run():
        out = soft_mix(logits, values, dim)
        return out.detach(), *torch.autograd.grad(out, (logits, values), grad)

    results = with_threads(run)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)
    flipped = soft_mix(logits.flip(0), values.flip(dim - 1), dim)  # the groups
    assert torch.equal(flipped.flip(2 - dim), results[0][0])


# -- properties of mixing


@each_dim
@each_dtype
def test_weights_sum_to_one(device, dim, dtype):
    logits, values, _ = arguments(2, 40, 24, 3, dim)
    out = soft_mix(logits.to(device, dtype), torch.ones_like(values).to(device, dtype), dim)
    assert_close(out, torch.ones(out.shape), slack=2 if multiplied_in_half(device, dtype) else 1)


@each_dim
def test_permuted_tokens(device, dim):
    logits, values, _ = (a.to(device) if isinstance(a, Tensor) else a for a in arguments(2, 9, 6, 5, dim))
    permutation = torch.randperm(9)
    out = soft_mix(logits, values, dim)
    if dim == 1:
        assert_close(soft_mix(logits[:, permutation], values[:, permutation], dim), out)
    else:
        assert_close(soft_mix(logits[:, permutation], values, dim), out[:, permutation])


@each_dim
def test_equal_logits_give_the_mean(device, dim):
    _, values, _ = arguments(2, 9, 6, 5, dim)
    out = soft_mix(torch.full((2, 9, 6), 3.0, dtype=torch.float64, device=device), values.to(device), dim)
    assert_close(by_group(out, 2), by_group(values, 2).mean(1, keepdim=True).expand(2, 6 if dim == 1 else 9, 5))


@each_dim
def test_a_line_far_above_is_a_hard_choice(device, dim):
    logits, values, _ = arguments(2, 9, 6, 5, dim)
    best = logits.argmax(dim)
    out = soft_mix((logits * 1e6).to(device), values.to(device), dim)
    assert torch.equal(by_group(out, 2).cpu(), by_group(values, 2).gather(1, best[..., None].expand(-1, -1, 5)))


# -- edge cases


@each_dim
@each_dtype
def test_extreme_logits(device, dim, dtype):
    logits, values, _ = arguments(2, 9, 6, 5, dim)
    logits = (torch.rand_like(logits) * 2 - 1) * 1e4
    logits[:, 3] = 1e4  # largest entries that tie in every column
    logits[:, 5] = 1e4
    logits[:, :, 2] = 1e4
    if multiplied_in_half(device, dtype):
        return check_in_half(logits.to(device, dtype), values.to(device, dtype), dim)
    check_reference(
        soft_mix,
        reference.soft_mix,
        [logits, values, dim],
        dtype,
        device,
        slack=2,
        gradient_slack=2,
    )


@each_dim
def test_masked_lines_give_zeros(device, dim):
    """A token or slot of -inf is masked: over both axes, a masked row neither contributes nor receives."""
    logits, values, _ = arguments(2, 9, 6, 5, dim)
    logits[0, 4] = -INF
    logits[0, :, 1] = -INF
    logits[1] = -INF
    logits[1, 2, 3] = 0.5
    check_reference(soft_mix, reference.soft_mix, [logits, values, dim], torch.float64, device)
    logits, values = logits.to(device).requires_grad_(), values.to(device).requires_grad_()
    out = soft_mix(logits, values, dim)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert logits.grad.isfinite().all()
    assert (logits.grad[logits.isneginf()] == 0).all()
    out, grad, values = (by_group(x, 2) for x in (out, values.grad, values))
    assert (out[0, 1 if dim == 1 else 4] == 0).all()
    assert (grad[0, 4 if dim == 1 else 1] == 0).all()
    assert torch.equal(out[1, 3 if dim == 1 else 2], values[1, 2 if dim == 1 else 3])


@each_dim
@pytest.mark.parametrize("others", [0.0, -INF])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_nan_is_not_hidden(device, dim, others, value, place):
    """NaN and inf reach the result from any position in a line, and beside any other entries."""
    logits = torch.full((1, 4, 4), others, device=device)
    logits[0, place, place] = value
    ones = torch.ones((1, 4, 2) if dim == 1 else (1, 1, 4, 2), device=device)
    out = by_group(soft_mix(logits, ones, dim), 1)
    if value == value and others == -INF:
        return  # a single +inf may give a hard choice or NaN
    assert out[0, place].isnan().all()
    assert out[0, (place + 1) % 4].isfinite().all()


@each_dim
@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2), (2, 4, 3, 0)])
def test_empty(device, dim, shape):
    logits, values, _ = arguments(*shape, dim)
    logits, values = logits.to(device).requires_grad_(), values.to(device).requires_grad_()
    out = soft_mix(logits, values, dim)
    G, T, S, D = shape
    assert torch.equal(out.cpu(), torch.zeros((1, G, S, D) if dim == 1 else (G, T, D), dtype=torch.float64))
    out.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@each_dim
def test_not_contiguous(device, dim):
    logits, values, _ = (a.to(device) if isinstance(a, Tensor) else a for a in arguments(2, 9, 6, 5, dim))
    results = []
    for view in (lambda x: x, strided, lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1)):
        a, b = view(logits).detach().requires_grad_(), view(values).detach().requires_grad_()
        out = soft_mix(a, b, dim)
        out.backward(strided(torch.ones_like(out)))
        results.append((out, a.grad, b.grad))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_close(x, y)


def test_refuses():
    logits, values = torch.randn(2, 9, 6), torch.randn(2, 9, 5)
    for wrong in (logits[0], logits.long(), logits.tolist(), logits.to("meta")):
        with refused(OP, "logits"):
            soft_mix(wrong, values, 1)
    for wrong in (
        values[0],
        values[:1],
        values[:, :6],
        values.long(),
        values.tolist(),
        values.to("meta"),
    ):
        with refused(OP, "values"):
            soft_mix(logits, wrong, 1)
    with refused(OP, "values"):
        soft_mix(logits, values, 2)
    for wrong in (values, torch.randn(2, 3, 2, 5), torch.randn(2, 2, 3, 5)[:1], torch.randn(4, 2, 1, 5)):
        with refused(OP, "values"):
            soft_mix(logits, wrong, 2)
    with refused(OP, "values"):
        soft_mix(torch.randn(2, 9, 0), torch.randn(0, 2, 3, 5), 2)
    for wrong in (0, 4, 1.5, None):
        with refused(OP, "num_experts"):
            soft_mix(logits, values, 1, wrong)
    for dim in (0, 3, -1, 1.5, None):
        with refused(OP, "dim"):
            soft_mix(logits, values, dim)
