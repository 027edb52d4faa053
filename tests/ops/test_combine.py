from __future__ import annotations

import pytest
import torch
from checks import (
    NAN,
    assert_close,
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

from vmoe_routers import ops
from vmoe_routers.ops import invert_slots, reference

OP = "combine"


def combine(y: Tensor, gate: Tensor | None, token: Tensor, offsets: Tensor, slots: Tensor) -> Tensor:
    """Calls the public function or, without a gate, the raw op, as the gradient of dispatch does."""
    if gate is None:
        return torch.ops.vmoe_routers.combine(y, None, token, offsets, slots)
    return ops.combine(y, gate, token, offsets, slots)


SHAPES = [
    # G, T, D, E, C
    (2, 7, 5, 3, 4),
    (1, 1, 1, 1, 1),
    (3, 4, 33, 6, 5),  # E > T, C > T
    (8, 49, 64, 8, 8),
]


def arguments(G: int, T: int, D: int, E: int, C: int, *, gated: bool = True, empty: float = 0.3) -> list[Tensor | None]:
    token = tokens_of_slots(G, T, E, C, empty=empty)
    y = torch.randn(E, G, C, D, dtype=torch.float64)
    gate = torch.randn(G, E, C, dtype=torch.float64) if gated else None
    return [y, gate, token, *invert_slots(token, T)[:2]]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(device, dtype, shape):
    check_reference(combine, reference.combine, arguments(*shape), dtype, device)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_without_a_gate(device, dtype, shape):
    check_reference(combine, reference.combine, arguments(*shape, gated=False), dtype, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_float32_with_experts_in_half(device, dtype):
    """With the dtypes of autocast, the gate is not rounded, and each gradient has the dtype of its tensor."""
    y, gate, token, offsets, slots = (a.to(device) for a in arguments(2, 7, 16, 3, 4))
    y, gate = y.to(dtype).requires_grad_(), gate.float().requires_grad_()
    y64, gate64 = y.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    out = combine(y, gate, token, offsets, slots)
    expected = reference.combine(y64, gate64, token, offsets, slots)
    assert out.dtype == dtype
    assert_close(out, expected)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    expected.backward(cotangent.double())
    assert (y.grad.dtype, gate.grad.dtype) == (dtype, torch.float32)
    assert_close(y.grad, y64.grad)
    assert_close(gate.grad, gate64.grad, slack=10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_rows_are_summed_in_float32_and_rounded_once(device, dtype):
    """The bits equal the rounded result of float32 rows of the same values."""
    y, gate, *slots = (a.to(device) for a in arguments(2, 7, 37, 3, 4))
    y, gate, cotangent = y.to(dtype), gate.float(), torch.randn(2, 7, 37, device=device).to(dtype)
    results = []
    for rows, grad in ((y, cotangent), (y.float(), cotangent.float())):
        leaves = [rows.requires_grad_(), gate.clone().requires_grad_()]
        out = combine(*leaves, *slots)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for half, wide in zip(*results, strict=True):
        assert torch.equal(half, wide.to(half.dtype))


def test_equal_tokens_get_equal_sums(device):
    """Equal rows give equal sums at any position, for widths with and without a remainder after whole vectors."""
    for width in (1, 17, 64, 131):
        token = torch.arange(6, dtype=torch.int32, device=device).view(1, 2, 3).flip(2)
        row, gate = torch.randn(1, 1, 1, width, device=device), torch.full((1, 2, 3), 0.3, device=device)
        y = row.expand(2, 1, 3, width).contiguous().requires_grad_()
        gate.requires_grad_()
        out = combine(y, gate, token, *invert_slots(token, 6)[:2])
        out.backward(row[0, 0].expand_as(out))
        for equal in (out[0], y.grad.flatten(0, 2), gate.grad.view(6, 1)):
            assert torch.equal(equal, equal[:1].expand_as(equal))


def test_is_the_einsum_with_the_combine_tensor(device):
    y, gate, token, offsets, slots = (a.to(device) for a in arguments(2, 7, 5, 3, 4))
    B = (token[:, None] == torch.arange(7, device=device)[:, None, None]) * gate[:, None]
    out = combine(y, gate, token, offsets, slots)
    assert out.shape == (2, 7, 5)
    assert_close(out, torch.einsum("gtec,egcd->gtd", B, y))


@pytest.mark.parametrize("gated", [True, False])
def test_gradient(gated):
    check_gradient(combine, arguments(2, 4, 3, 3, 2, gated=gated))


@pytest.mark.parametrize("wanted", ["y", "gate"])
def test_gradient_of_one_argument_alone(device, wanted):
    y, gate, *slots = (a.to(device) for a in arguments(2, 4, 3, 3, 2))
    leaf = {"y": y, "gate": gate}[wanted].requires_grad_()
    actual = torch.autograd.grad(combine(y, gate, *slots).square().sum(), leaf)[0]
    expected = torch.autograd.grad(reference.combine(y, gate, *slots).square().sum(), leaf)[0]
    assert_close(actual, expected)


@pytest.mark.parametrize("gated", [True, False])
def test_dispatcher(device, gated):
    y, gate, *slots = (None if a is None else a.to(device) for a in arguments(2, 4, 3, 3, 2, gated=gated))
    gate = gate if gate is None else gate.requires_grad_()
    check_dispatcher(torch.ops.vmoe_routers.combine.default, [y.requires_grad_(), gate, *slots])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dispatcher_of_the_backward(device, dtype):
    y, gate, token, *_ = (a.to(device) for a in arguments(2, 4, 3, 3, 2))
    grad = torch.randn(2, 4, 3, dtype=dtype, device=device)
    y, gate = y.to(dtype), gate.to(torch.float64 if dtype == torch.float64 else torch.float32)
    check_dispatcher(torch.ops.vmoe_routers.combine_backward.default, [grad, y, gate, token])


@pytest.mark.parametrize("gated", [True, False])
def test_compile(device, gated):
    check_compile(combine, arguments(2, 4, 3, 3, 2, gated=gated), device)


@pytest.mark.parametrize("gated", [True, False])
def test_empty_slots_do_not_affect_the_result(device, gated):
    """NaN in empty slots of the outputs, the gates or both changes no value and no gradient."""
    y, gate, token, offsets, slots = arguments(2, 7, 5, 3, 4, gated=gated)
    empty = token < 0
    assert empty.any()
    dirty_y = y.masked_fill(empty.transpose(0, 1)[..., None], NAN)
    dirty_gate = None if gate is None else gate.masked_fill(empty, NAN)
    results = []
    for a, b in ((y, gate), (dirty_y, dirty_gate)):
        leaves = [x.detach().to(device).requires_grad_() for x in (a, b) if x is not None]
        out = combine(
            leaves[0],
            leaves[1] if gated else None,
            *(x.to(device) for x in (token, offsets, slots)),
        )
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    assert (results[0][1].transpose(0, 1)[empty] == 0).all()


def test_a_token_without_a_slot_gets_zeros(device):
    token = torch.tensor([[[1]]], dtype=torch.int32, device=device)
    out = combine(torch.ones(1, 1, 1, 2, device=device), None, token, *invert_slots(token, 3)[:2])
    assert out.tolist() == [[[0, 0], [1, 1], [0, 0]]]


@pytest.mark.parametrize(
    "G, T, D, E, C",
    [(0, 4, 3, 2, 2), (2, 0, 3, 2, 2), (2, 4, 0, 2, 2), (2, 4, 3, 2, 0), (2, 4, 3, 0, 2)],
)
def test_empty(device, G, T, D, E, C):
    y, gate, token, *csr = (a.to(device) for a in arguments(G, T, D, E, C, empty=1.0))
    out = combine(y.requires_grad_(), gate.requires_grad_(), token, *csr)
    assert torch.equal(out.cpu(), torch.zeros(G, T, D, dtype=torch.float64))
    out.sum().backward()
    assert torch.equal(y.grad, torch.zeros_like(y))
    assert torch.equal(gate.grad, torch.zeros_like(gate))


def test_not_contiguous(device):
    inputs = [a.to(device) for a in arguments(2, 7, 5, 3, 4)]
    wanted = combine(*inputs)
    assert torch.equal(combine(*(strided(a) for a in inputs)), wanted)
    y, gate, token, *csr = inputs
    # The experts' outputs are stored as [G, E, C, D], and the cotangent is expanded.
    view = y.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    combine(view, gate, token, *csr).sum().backward()
    expected = torch.where(token < 0, 0, gate).transpose(0, 1)[..., None].expand_as(y)
    assert_close(view.grad, expected)


def test_invalid_offsets_are_clamped_and_invalid_slots_skipped(device):
    """Offsets are clamped to [0, E * C], and slots outside [0, E * C) are skipped, also in dispatch's backward."""
    y, gate, token, _, _ = (a.to(device) for a in arguments(1, 3, 5, 2, 2))
    offsets = torch.tensor([[-(10**6), 2, 1, 10**6]], dtype=torch.int32, device=device)
    slots = torch.tensor([[10**6, 3, -1, 2]], dtype=torch.int32, device=device)
    out = combine(y, gate, token, offsets, slots)
    rows = (gate.transpose(0, 1)[..., None] * y)[:, 0].flatten(0, 1)  # by slot
    assert_close(out[0], torch.stack([rows[3], torch.zeros_like(rows[0]), rows[3] + rows[2]]))
    x = torch.randn(1, 3, 5, dtype=torch.float64, device=device, requires_grad=True)
    ops.dispatch(x, token, offsets, slots).backward(y)
    assert torch.equal(x.grad, combine(y, None, token, offsets, slots))


def test_refuses():
    y, gate, token, offsets, slots = arguments(2, 7, 5, 3, 4)
    with refused(OP, "y"):
        combine(y[0], gate, token, offsets, slots)
    with refused(OP, "y"):
        combine(y.long(), gate, token, offsets, slots)
    with refused(OP, "y"):
        combine(y.tolist(), gate, token, offsets, slots)
    with refused(OP, "y"):
        combine(y.to("meta"), gate, token, offsets, slots)
    with refused(OP, "gate"):
        combine(y, gate[:1], token, offsets, slots)
    with refused(OP, "gate"):
        combine(y, gate.transpose(0, 1), token, offsets, slots)
    with refused(OP, "gate"):
        combine(y, gate.long(), token, offsets, slots)
    with refused(OP, "gate"):
        combine(y, gate.to("meta"), token, offsets, slots)
    with refused(OP, "token"):
        combine(y, gate, token.flatten(1), offsets, slots)
    other = tokens_of_slots(2, 7, 4, 3)  # E and C swapped
    with refused(OP, "token"):
        combine(y, gate, other, *invert_slots(other, 7)[:2])
    with refused(OP, "token"):
        combine(y, gate, token.long(), offsets, slots)
    with refused(OP, "offsets"):
        combine(y, gate, token, offsets[:1], slots)
    with refused(OP, "offsets"):
        combine(y, gate, token, offsets.float(), slots)
    with refused(OP, "slots"):
        combine(y, gate, token, offsets, slots[:, 1:])
    with refused(OP, "slots"):
        combine(y, gate, token, offsets, slots.to("meta"))
    with refused(OP, "token"):
        combine(y, gate, token.to("meta"), offsets.to("meta"), slots.to("meta"))
