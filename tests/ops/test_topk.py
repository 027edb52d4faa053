from __future__ import annotations

import itertools

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
    tied,
)

from vmoe_routers.ops import reference, topk

OP = "topk"


@each_dtype
@pytest.mark.parametrize("k, dim", [(1, -1), (3, -1), (7, -1), (1, 1), (8, 1), (9, 1), (30, 1), (2, 0)])
@pytest.mark.parametrize("values", [spread, tied])
def test_reference(device, dtype, k, dim, values):
    check_reference(topk, reference.topk, [values(2, 30, 7), k, dim], dtype, device)


@pytest.mark.parametrize("k", [1, 8, 9, 100, 999, 1000])
def test_long_axis_with_ties(device, k):
    x = tied(3, 1000, levels=20).float().to(device)
    values, indices = topk(x, k)
    expected_values, expected_indices = reference.topk(x, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(indices, expected_indices)


@pytest.mark.parametrize("k, dim", [(2, -1), (3, 1)])
def test_gradient(k, dim):
    check_gradient(topk, [torch.randperm(40).double().view(2, 4, 5), k, dim])


def test_gradient_reaches_only_the_chosen(device):
    x = torch.tensor([1.0, 3.0, 3.0, 2.0], device=device, requires_grad=True)
    values, indices = topk(x, 2)
    assert not indices.requires_grad
    (values * torch.tensor([10.0, 20.0], device=device)).sum().backward()
    assert x.grad.tolist() == [0, 10, 20, 0]


def test_dispatcher(device):
    x = spread(2, 6, 5).float().to(device).requires_grad_()
    check_dispatcher(torch.ops.vmoe_routers.topk.default, [x, 2, 2])
    check_dispatcher(torch.ops.vmoe_routers.topk.default, [x.double().detach(), 6, 1])


def test_compile(device):
    check_compile(topk, [spread(2, 6, 5), 2, 1], device)


@pytest.mark.parametrize("k", range(1, 5))
def test_every_order_of_special_values(device, k):
    """Every row of four of these values is sorted: NaN first, then by value, and ties (also of 0 and -0) by index."""
    rows = torch.tensor(list(itertools.product([NAN, INF, 1.0, 0.0, -0.0, -INF], repeat=4)))
    values, indices = topk(rows.to(device), k)
    for row, got, value in zip(rows.tolist(), indices.tolist(), values.cpu(), strict=True):
        wanted = sorted(range(4), key=lambda i: (row[i] == row[i], -row[i] if row[i] == row[i] else 0.0, i))[:k]
        assert got == wanted
        assert torch.equal(value.nan_to_num(7.0), torch.tensor(row)[wanted].nan_to_num(7.0))


@pytest.mark.parametrize("value", [0.0, NAN, INF, -INF])
def test_all_equal(device, value):
    _, indices = topk(torch.full((2, 20), value, device=device), 20)
    assert indices.tolist() == [list(range(20))] * 2


@pytest.mark.parametrize(
    "shape, k, dim",
    [((0, 5), 2, -1), ((3, 0, 5), 2, 2), ((3, 0), 0, 1), ((1,), 1, 0), ((2, 1, 3), 1, 1)],
)
def test_empty_and_one(device, shape, k, dim):
    x = torch.randn(shape, device=device)
    values, indices = topk(x, k, dim)
    assert values.shape == indices.shape == (*x.movedim(dim, -1).shape[:-1], k)
    assert torch.equal(values, reference.topk(x, k, dim)[0])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_not_contiguous(device, dim):
    x = tied(4, 6, 5, levels=5).float().to(device)
    for view in (strided(x), x.transpose(0, 2), x[:1].expand(4, 6, 5)):
        for got, wanted in zip(topk(view, 3, dim), reference.topk(view, 3, dim), strict=True):
            assert torch.equal(got, wanted)


def test_order_of_the_input_does_not_change_the_values(device):
    x = spread(200).to(device)
    assert torch.equal(topk(x, 50)[0], topk(x[torch.randperm(200)], 50)[0])


def test_refuses():
    x = torch.randn(2, 5)
    for k in (0, -1, 6, 1.5, None, True):
        with refused(OP, "k"):
            topk(x, k)
    for dim in (2, -3):
        with refused(OP, "dim"):
            topk(x, 1, dim)
    with refused(OP, "x"):
        topk(torch.ones(2, 5, dtype=torch.int64), 1)
    with refused(OP, "x"):
        topk(torch.ones(2, 5, dtype=torch.complex64), 1)
    with refused(OP, "x"):
        topk(torch.tensor(1.0), 1)
    with refused(OP, "x"):
        topk([1.0, 2.0], 1)
