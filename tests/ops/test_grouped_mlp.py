from __future__ import annotations

import pytest
import torch
from checks import (
    INF,
    NAN,
    assert_close,
    check_compile,
    check_gradient,
    check_reference,
    each_dtype,
    refused,
    strided,
)
from torch import Tensor, nn

from vmoe_routers.ops import grouped_mlp, reference

OP = "grouped_mlp"

SHAPES = [
    # E, N, D, F, out
    (3, 5, 4, 7, 4),
    (1, 1, 1, 1, 1),
    (8, 33, 16, 64, 10),
]


def arguments(E: int, N: int, D: int, F: int, out: int, *, bias: bool = True) -> list[Tensor | None]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    w1, w2 = normal(E, D, F) / D**0.5, normal(E, F, out) / F**0.5
    return [
        normal(E, N, D),
        w1,
        normal(E, F) if bias else None,
        w2,
        normal(E, out) if bias else None,
    ]


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(device, dtype, shape, bias):
    # A matmul in half rounds the hidden layer too: two roundings more, on sums of some terms.
    slack = 8 if dtype in (torch.bfloat16, torch.float16) else 2
    inputs = arguments(*shape, bias=bias)
    if dtype in (torch.bfloat16, torch.float16):
        result = grouped_mlp(*(None if a is None else a.to(device, dtype) for a in inputs))
        wanted = reference.grouped_mlp(*(None if a is None else a.to(dtype).double() for a in inputs))
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double().cpu(),
            wanted,
            rtol=0,
            atol=slack * torch.finfo(dtype).eps * wanted.abs().max().item(),
        )
    else:
        check_reference(
            grouped_mlp,
            reference.grouped_mlp,
            inputs,
            dtype,
            device,
            slack=slack,
            gradient_slack=slack,
        )


@pytest.mark.parametrize("bias", [True, False])
def test_is_an_mlp_per_expert(device, bias):
    x, w1, b1, w2, b2 = (None if a is None else a.to(device) for a in arguments(3, 5, 4, 7, 6, bias=bias))
    out = grouped_mlp(x, w1, b1, w2, b2)
    assert out.shape == (3, 5, 6)
    for e in range(3):
        hidden = nn.functional.linear(x[e], w1[e].t(), None if b1 is None else b1[e])
        wanted = nn.functional.linear(nn.GELU("tanh")(hidden), w2[e].t(), None if b2 is None else b2[e])
        assert_close(out[e], wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_gradient(bias):
    inputs = [None if a is None else a.requires_grad_() for a in arguments(2, 3, 2, 3, 2, bias=bias)]
    check_gradient(grouped_mlp, inputs)


@pytest.mark.parametrize("bias", [True, False])
def test_compile(device, bias):
    check_compile(grouped_mlp, arguments(2, 3, 2, 3, 2, bias=bias), device)


@pytest.mark.parametrize("shape", [(0, 5, 4, 7, 4), (3, 0, 4, 7, 4), (3, 5, 4, 7, 0)])
def test_empty(device, shape):
    inputs = [a.to(device).requires_grad_() for a in arguments(*shape)]
    out = grouped_mlp(*inputs)
    assert out.shape == (shape[0], shape[1], shape[4])
    out.sum().backward()
    assert all(torch.equal(a.grad, torch.zeros_like(a)) for a in inputs[:3])


def test_experts_do_not_see_each_other(device):
    inputs = [a.to(device) for a in arguments(3, 5, 4, 7, 4)]
    wanted = grouped_mlp(*inputs)
    inputs[0][1, 2] = torch.tensor([NAN, INF, -INF, 1.0])
    out = grouped_mlp(*inputs)
    assert out[1, 2].isnan().all()
    out[1, 2] = wanted[1, 2]
    assert_close(out, wanted)


def test_not_contiguous(device):
    inputs = [a.to(device) for a in arguments(3, 5, 4, 7, 6)]
    assert_close(grouped_mlp(*(strided(a) for a in inputs)), grouped_mlp(*inputs))


def test_other_activation(device):
    inputs = arguments(3, 5, 4, 7, 6)
    check_reference(
        lambda *a: grouped_mlp(*a, torch.tanh),
        lambda *a: reference.grouped_mlp(*a, torch.tanh),
        inputs,
        torch.float64,
        device,
    )


def test_refuses():
    x, w1, b1, w2, b2 = arguments(3, 5, 4, 7, 6)
    for wrong in (x[0], x[:2], x[..., :3], x.long(), x.tolist(), x.to("meta")):
        with refused(OP, "x|w1"):
            grouped_mlp(wrong, w1, b1, w2, b2)
    for wrong in (w1[0], w1[:2], w1[:, :3], w1.float(), w1.to("meta")):
        with refused(OP, "w1"):
            grouped_mlp(x, wrong, b1, w2, b2)
    for wrong in (b1[0], b1[:, :6], b1[:, None], b1.float()):
        with refused(OP, "b1"):
            grouped_mlp(x, w1, wrong, w2, b2)
    for wrong in (w2[0], w2[:2], w2[:, :6], w2.float()):
        with refused(OP, "w2"):
            grouped_mlp(x, w1, b1, wrong, b2)
    for wrong in (b2[0], b2[:, :5], b2[:, None], b2.float()):
        with refused(OP, "b2"):
            grouped_mlp(x, w1, b1, w2, wrong)
