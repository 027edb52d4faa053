from __future__ import annotations

import pytest
import torch
from checks import (
    INF,
    NAN,
    check_compile,
    check_dispatcher,
    check_gradient,
    check_reference,
    each_dtype,
    refused,
    strided,
)
from test_invert_slots import tokens_of_slots
from torch import Tensor

from vmoe_routers.ops import dispatch, invert_slots, reference

OP = "dispatch"

SHAPES = [
    # G, T, D, E, C
    (2, 7, 5, 3, 4),
    (1, 1, 1, 1, 1),
    (3, 4, 33, 6, 5),  # E > T, C > T
    (8, 49, 64, 8, 8),
]


def arguments(G: int, T: int, D: int, E: int, C: int, *, empty: float = 0.3) -> list[Tensor]:
    token = tokens_of_slots(G, T, E, C, empty=empty)
    return [torch.randn(G, T, D, dtype=torch.float64), token, *invert_slots(token, T)[:2]]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(device, dtype, shape):
    check_reference(dispatch, reference.dispatch, arguments(*shape), dtype, device)


def test_is_the_einsum_with_the_dispatch_tensor(device):
    x, token, offsets, slots = (a.to(device) for a in arguments(2, 7, 5, 3, 4))
    D = (token[:, None] == torch.arange(7, device=device)[:, None, None]).double()
    out = dispatch(x, token, offsets, slots)
    assert out.shape == (3, 2, 4, 5)
    assert torch.equal(out, torch.einsum("gtec,gtd->egcd", D, x))


def test_gradient():
    check_gradient(dispatch, arguments(2, 4, 3, 3, 2))


def test_dispatcher(device):
    x, *slots = (a.to(device) for a in arguments(2, 4, 3, 3, 2))
    check_dispatcher(torch.ops.vmoe_routers.dispatch.default, [x.requires_grad_(), *slots])


def test_compile(device):
    check_compile(dispatch, arguments(2, 4, 3, 3, 2), device)


@each_dtype
def test_copies_bit_by_bit(device, dtype):
    """Special values are copied, too. They reach only the slots of their own token."""
    x = torch.tensor([[[1.0, NAN], [INF, -INF], [-0.0, 3.0]]]).to(device, dtype)
    token = torch.tensor([[[1, -1], [0, 0], [2, 1]]], dtype=torch.int32, device=device)
    out = dispatch(x, token, *invert_slots(token, 3)[:2])
    zero = torch.zeros(2).to(device, dtype)
    wanted = torch.stack([x[0, 1], zero, x[0, 0], x[0, 0], x[0, 2], x[0, 1]])
    assert torch.equal(out.view(6, 2).view(torch.int8), wanted.view(torch.int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_larger_than_the_caches(device, dtype):
    """Large outputs take non-temporal stores, in forward and in the combine of backward."""
    width, tokens = 4096 // dtype.itemsize, 8200
    x = torch.randn(1, tokens, width, device=device).to(dtype).requires_grad_()
    order = torch.randperm(tokens, device=device)
    token = order.int().view(1, 1, tokens)
    out = dispatch(x, token, *invert_slots(token, tokens)[:2])
    assert torch.equal(out[0, 0], x[0, order])
    out.backward(out.detach())
    assert torch.equal(x.grad, x)


def test_gradient_of_an_empty_slot_is_ignored(device):
    token = torch.tensor([[[0, -1]]], dtype=torch.int32, device=device)
    x = torch.randn(1, 2, 3, device=device, requires_grad=True)
    cotangent = torch.ones(1, 1, 2, 3, device=device)
    cotangent[0, 0, 1] = NAN
    dispatch(x, token, *invert_slots(token, 2)[:2]).backward(cotangent)
    assert x.grad.tolist() == [[[1, 1, 1], [0, 0, 0]]]


@pytest.mark.parametrize(
    "G, T, D, E, C",
    [(0, 4, 3, 2, 2), (2, 0, 3, 2, 2), (2, 4, 0, 2, 2), (2, 4, 3, 2, 0), (2, 4, 3, 0, 2)],
)
def test_empty(device, G, T, D, E, C):
    x, token, *csr = (a.to(device) for a in arguments(G, T, D, E, C, empty=1.0))
    x.requires_grad_()
    out = dispatch(x, token, *csr)
    assert torch.equal(out.cpu(), torch.zeros(E, G, C, D, dtype=torch.float64))
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_not_contiguous(device):
    x, token, offsets, slots = (a.to(device) for a in arguments(2, 7, 5, 3, 4))
    wanted = dispatch(x, token, offsets, slots)
    assert torch.equal(dispatch(*(strided(a) for a in (x, token, offsets, slots))), wanted)
    transposed = x.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    out = dispatch(transposed, token, offsets, slots)
    assert torch.equal(out, wanted)
    # A cotangent with the strides of a [G, E, C, D] view.
    out.transpose(0, 1).square().sum().backward()
    expected = x.requires_grad_()
    reference.dispatch(expected, token).square().sum().backward()
    torch.testing.assert_close(transposed.grad, expected.grad)


def test_refuses():
    x, token, offsets, slots = arguments(2, 7, 5, 3, 4)
    with refused(OP, "x"):
        dispatch(x[0], token, offsets, slots)
    with refused(OP, "x"):
        dispatch(x.long(), token, offsets, slots)
    with refused(OP, "x"):
        dispatch(x.tolist(), token, offsets, slots)
    with refused(OP, "x"):
        dispatch(x.to("meta"), token, offsets, slots)
    with refused(OP, "token"):
        dispatch(x, token[:1], offsets[:1], slots[:1])
    with refused(OP, "token"):
        dispatch(x, token.long(), offsets, slots)
    with refused(OP, "token"):
        dispatch(x, token.flatten(1), offsets, slots)
    with refused(OP, "token"):
        dispatch(x, token.to("meta"), offsets, slots)
    with refused(OP, "offsets"):
        dispatch(x, token, offsets[:, 1:], slots)
    with refused(OP, "offsets"):
        dispatch(x, token, offsets.float(), slots)
    with refused(OP, "slots"):
        dispatch(x, token, offsets, slots[:, 1:])
    with refused(OP, "slots"):
        dispatch(x, token, offsets, slots.to("meta"))
    with refused(OP, "token"):
        dispatch(x, token.to("meta"), offsets.to("meta"), slots.to("meta"))
