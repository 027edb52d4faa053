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
    strided,
    with_threads,
)
from torch import Tensor

from vmoe_routers.ops import reference, soft_logits
from vmoe_routers.ops._dtypes import HALF_PRODUCTS

OP = "soft_logits"

SHAPES = [
    # G, T, D, S
    (2, 9, 5, 6),
    (1, 1, 1, 1),
    (2, 1, 7, 3),
    (2, 7, 3, 1),
    (37, 3, 4, 5),  # more groups than runs in the sum of Phi's gradient
    (4, 49, 64, 32),
]


def arguments(G: int, T: int, D: int, S: int) -> list[Tensor]:
    return [torch.randn(G, T, D, dtype=torch.float64), torch.randn(D, S, dtype=torch.float64)]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(device, dtype, shape):
    """For inputs of 16-bit dtypes, the logits of the rounded inputs are float32."""
    x, phi = (a.to(device, dtype) for a in arguments(*shape))
    if dtype in (torch.float32, torch.float64):
        check_reference(soft_logits, reference.soft_logits, [x, phi], dtype, device, slack=2, gradient_slack=4)
        return
    out = soft_logits(x.requires_grad_(), phi)
    assert out.dtype == torch.float32
    assert_close(out, reference.soft_logits(x.double(), phi.double()), slack=2)
    out.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_in_half_with_phi_in_float32(device, dtype, shape):
    """As in a router: phi is not rounded to the tokens' dtype, and neither is the sum over tokens in its gradient."""
    x, phi = arguments(*shape)
    x, phi = x.to(device, dtype).requires_grad_(), phi.to(device).float().requires_grad_()
    x64, phi64 = (a.detach().double().cpu().requires_grad_() for a in (x, phi))
    out, expected = soft_logits(x, phi), reference.soft_logits(x64, phi64)
    cotangent = torch.randn(expected.shape)
    out.backward(cotangent.to(device))
    expected.backward(cotangent.double())
    assert (out.dtype, x.grad.dtype, phi.grad.dtype) == (torch.float32, dtype, torch.float32)
    r = (x64.detach().square().sum(2, keepdim=True) + 1e-6).rsqrt()
    unit, phi_size, sizes = (x64.detach() * r).abs(), phi64.detach().abs(), cotangent.double().abs()
    along = r * (sizes @ phi_size.T)
    along = along + unit * (unit * along).sum(2, keepdim=True)
    half = device in HALF_PRODUCTS
    epsilon = torch.finfo(dtype).eps if half else 1e-6
    for actual, wanted, summed, off in (
        (out, expected, unit @ phi_size, 2**-15 if half else 1e-6),
        (phi.grad, phi64.grad, (unit.mT @ sizes).sum(0), epsilon),
        (x.grad, x64.grad, along, 2 * torch.finfo(dtype).eps),
    ):
        assert ((actual.detach().double().cpu() - wanted.detach()).abs() <= off * summed + 1e-6).all()


def test_gradient():
    check_gradient(soft_logits, arguments(2, 4, 3, 2))


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_of_one_argument_alone(device, wanted):
    inputs = [a.to(device) for a in arguments(2, 9, 6, 5)]
    leaf = inputs[wanted].requires_grad_()
    actual = torch.autograd.grad(soft_logits(*inputs).square().sum(), leaf)[0]
    expected = torch.autograd.grad(reference.soft_logits(*inputs).square().sum(), leaf)[0]
    assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dispatcher(device, dtype):
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the op takes 16 bits on CUDA")
    x, phi = (a.to(device) for a in arguments(2, 4, 3, 2))
    x, phi = x.to(dtype), phi.to(torch.promote_types(dtype, torch.float32))
    grad = torch.randn(2, 4, 2, dtype=phi.dtype, device=device)
    check_dispatcher(torch.ops.vmoe_routers.soft_logits_backward.default, [grad, x, phi])
    check_dispatcher(torch.ops.vmoe_routers.soft_logits.default, [x.requires_grad_(), phi.requires_grad_()])


def test_compile(device):
    check_compile(soft_logits, arguments(2, 4, 3, 2), device)


def test_keeps_its_arguments_and_nothing_else():
    x, phi = (a.requires_grad_() for a in arguments(2, 9, 6, 5))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        soft_logits(x, phi)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), phi.data_ptr()}


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("G", [1, 5, 40])
def test_does_not_depend_on_threads_or_neighbours(G):
    x, phi = (a.float() for a in arguments(G, 49, 64, 48))
    x.requires_grad_()
    phi.requires_grad_()
    grad = torch.randn(G, 49, 48)

    def run():
        out = soft_logits(x, phi)
        return out.detach(), *torch.autograd.grad(out, (x, phi), grad)

    results = with_threads(run)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a, b)
    assert torch.equal(soft_logits(x.flip(0), phi).flip(0), results[0][0])


# -- edge cases


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-4, 1e4, 1e18, 1e30])
def test_tokens_of_any_length(device, dtype, length):
    """|x| = 1e30 is used because |x|^2 overflows float32 there."""
    x, phi = (a.to(device, dtype) for a in arguments(2, 9, 6, 5))
    x = (x * length).requires_grad_()
    out = soft_logits(x, phi)
    exact = x.detach().double().requires_grad_()
    expected = reference.soft_logits(exact, phi.double())
    assert_close(out, expected, slack=2)
    out.sum().backward()
    expected.sum().backward()
    size = exact.grad.abs().max()
    assert_close(x.grad.double() / size, exact.grad / size, slack=20, dtype=dtype)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_token_is_not_hidden(device, bad):
    x, phi = (a.to(device) for a in arguments(2, 9, 6, 5))
    clean = soft_logits(x, phi)
    x[1, 3, 2] = bad
    out = soft_logits(x, phi)
    assert out[1, 3].isnan().all()
    out[1, 3] = clean[1, 3]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 3, 0), (2, 4, 0, 3)])
def test_empty(device, shape):
    x, phi = (a.to(device).requires_grad_() for a in arguments(*shape))
    out = soft_logits(x, phi)
    assert out.shape == (shape[0], shape[1], shape[3])
    assert (out == 0).all()
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    assert torch.equal(phi.grad, torch.zeros_like(phi))


def test_not_contiguous(device):
    x, phi = (a.to(device) for a in arguments(2, 9, 6, 5))
    results = []
    for view in (lambda a: a, strided, lambda a: a.transpose(0, 1).contiguous().transpose(0, 1)):
        a, b = view(x).detach().requires_grad_(), view(phi).detach().requires_grad_()
        out = soft_logits(a, b)
        out.backward(strided(torch.ones_like(out)))
        results.append((out, a.grad, b.grad))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_close(a, b)


def test_refuses():
    x, phi = torch.randn(2, 9, 6), torch.randn(6, 5)
    for wrong in (x[0], x.long(), x.tolist()):
        with refused(OP, "x"):
            soft_logits(wrong, phi)
    for wrong in (phi[0], phi[:5], phi.T, phi.long(), phi.tolist(), phi.to("meta")):
        with refused(OP, "phi"):
            soft_logits(x, wrong)
