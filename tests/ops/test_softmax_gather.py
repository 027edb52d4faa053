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
    spread,
    strided,
)

from vmoe_routers.ops import reference, softmax_gather

OP = "softmax_gather"


def some_indices(shape, dim, picks):
    """Returns random indices, some repeated, some outside of the axis."""
    G, n, places = shape[0], shape[3 - dim], shape[dim]
    return torch.randint(-1, places + 1, (G, n, picks), dtype=torch.int32)


@each_dtype
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("shape", [(2, 30, 7), (1, 5, 16), (3, 17, 33), (2, 9, 1)])
def test_reference(device, dtype, shape, dim):
    inputs = [spread(*shape), some_indices(shape, dim, 5), dim]
    check_reference(softmax_gather, reference.softmax_gather, inputs, dtype, device)


@pytest.mark.parametrize("dim", [1, 2])
def test_large_logits_keep_their_precision(device, dim):
    """In float32, a logsumexp of 1e4 would have an error of 5e-4."""
    logits = (torch.randn(2, 30, 7) + 1e4).float().double()
    inputs = [logits, some_indices((2, 30, 7), dim, 4), dim]
    check_reference(softmax_gather, reference.softmax_gather, inputs, torch.float32, device)


@pytest.mark.parametrize("dim", [1, 2])
def test_gradient(dim):
    indices = some_indices((2, 6, 5), dim, 4)
    check_gradient(lambda logits: softmax_gather(logits, indices, dim), [spread(2, 6, 5)])


def test_gradient_of_a_masked_token(device):
    logits = torch.tensor([[[-INF, -INF], [1.0, 2.0], [3.0, -INF]]], device=device, requires_grad=True)
    indices = torch.tensor([[[0, 1], [0, 1], [0, 1]]], dtype=torch.int32, device=device)
    values = softmax_gather(logits, indices)
    p = 1 / (1 + torch.e)
    torch.testing.assert_close(values.cpu(), torch.tensor([[[0, 0], [p, 1 - p], [1, 0]]]))
    values[..., 0].sum().backward()
    torch.testing.assert_close(logits.grad.cpu(), torch.tensor([[[0, 0], [p * (1 - p), p * (p - 1)], [0, 0]]]))


@pytest.mark.parametrize("dim", [1, 2])
def test_dispatcher(device, dim):
    logits = spread(2, 6, 5).float().to(device).requires_grad_()
    indices = some_indices((2, 6, 5), dim, 3).to(device)
    check_dispatcher(torch.ops.vmoe_routers.softmax_gather.default, [logits, indices, dim])
    values, norms = torch.ops.vmoe_routers.softmax_gather(logits.detach(), indices, dim)
    arguments = [torch.randn_like(values), values, logits.detach(), indices, norms, dim]
    check_dispatcher(torch.ops.vmoe_routers.softmax_gather_backward.default, arguments)


@pytest.mark.parametrize("dim", [1, 2])
def test_compile(device, dim):
    check_compile(softmax_gather, [spread(2, 6, 5), some_indices((2, 6, 5), dim, 3), dim], device)


@pytest.mark.parametrize("value", [NAN, INF])
def test_a_nan_or_infinite_logit_makes_only_its_row_nan(device, value):
    logits = torch.randn(1, 40, 9, device=device)
    everything = torch.arange(9, dtype=torch.int32, device=device).expand(1, 40, 9)
    clean = softmax_gather(logits, everything)
    logits[0, 7, 3] = value
    gates = softmax_gather(logits, everything)
    assert gates[0, 7].isnan().all()
    assert torch.equal(gates[0, :7], clean[0, :7])
    assert torch.equal(gates[0, 8:], clean[0, 8:])


def test_extreme_logits(device):
    logits = torch.tensor([[[3e38, -3e38, 0.0], [-3e38, -3e38, -INF], [1e-40, 0.0, -200.0]]], device=device)
    gates = softmax_gather(logits, torch.arange(3, dtype=torch.int32, device=device).expand(1, 3, 3))
    torch.testing.assert_close(gates.cpu(), torch.tensor([[[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 0]]]))


@pytest.mark.parametrize(
    ("shape", "dim", "picks"),
    [((0, 5, 3), 2, 2), ((2, 0, 3), 2, 2), ((2, 0, 3), 1, 0), ((2, 4, 0), 2, 0), ((2, 4, 0), 1, 2), ((1, 1, 1), 1, 1)],
)
def test_empty_and_one(device, shape, dim, picks):
    logits = torch.randn(shape, device=device, requires_grad=True)
    indices = torch.zeros(shape[0], shape[3 - dim], picks, dtype=torch.int32, device=device)
    values = softmax_gather(logits, indices, dim)
    assert torch.equal(values, reference.softmax_gather(logits, indices, dim))
    values.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dim", [1, 2])
def test_not_contiguous(device, dim):
    logits = torch.randn(4, 6, 6, device=device)
    indices = some_indices((4, 6, 6), dim, 3).to(device)
    for view in (strided(logits), logits.transpose(1, 2), logits[:1].expand(4, 6, 6)):
        wanted = softmax_gather(view.contiguous(), indices, dim)
        assert torch.equal(softmax_gather(view, strided(indices), dim), wanted)


def test_refuses():
    logits, indices = torch.randn(2, 5, 4), torch.zeros(2, 5, 3, dtype=torch.int32)
    with refused(OP, "logits"):
        softmax_gather(logits[0], indices)
    with refused(OP, "logits"):
        softmax_gather(logits.long(), indices)
    for wrong in (indices.long(), indices[0], indices[:1], indices[:, :4], indices.to("meta"), [0]):
        with refused(OP, "indices"):
            softmax_gather(logits, wrong)
    with refused(OP, "indices"):
        softmax_gather(logits, indices, 1)
    for dim in (0, 3, -1):
        with refused(OP, "dim"):
            softmax_gather(logits, indices, dim)
