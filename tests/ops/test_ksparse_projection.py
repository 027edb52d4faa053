from __future__ import annotations

from itertools import combinations

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
)
from torch import Tensor

from vmoe_routers.ops import ksparse_projection, reference

OP = "ksparse_projection"


def onto_support(x: Tensor, support: tuple[int, ...]) -> Tensor:
    """Projects x [n] onto the simplex over ``support``, by bisection for the threshold."""
    u = x[list(support)]
    low, high = u.max() - 1, u.max()
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (u - middle).clamp(min=0).sum() > 1 else (low, middle)
    p = torch.zeros_like(x)
    p[list(support)] = (u - low).clamp(min=0)
    return p


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_brute_force(device, k, scale):
    """Returns the nearest of the projections onto the simplices of all supports of k entries."""
    x = spread(8, 6, scale=scale)
    for project in (reference.ksparse_projection, ksparse_projection):
        p = project(x.to(device), k).cpu()
        for row, got in zip(x, p, strict=True):
            candidates = [onto_support(row, support) for support in combinations(range(6), k)]
            nearest = min(candidates, key=lambda candidate: (candidate - row).square().sum())
            torch.testing.assert_close(got, nearest, rtol=0, atol=1e-9)


@each_dtype
@pytest.mark.parametrize("k", [1, 2, 8, 9, 29, 30])
@pytest.mark.parametrize("values", [lambda *shape: spread(*shape, scale=0.2), spread, tied])
def test_reference(device, dtype, k, values):
    check_reference(ksparse_projection, reference.ksparse_projection, [values(3, 4, 30), k], dtype, device)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_gradient(k):
    check_gradient(ksparse_projection, [spread(4, 6, scale=0.3), k])


def test_gradient_is_centred_on_the_support(device):
    x = torch.tensor([0.5, 0.4, 0.3, -3.0], device=device, requires_grad=True)
    p = ksparse_projection(x, 2)
    assert_close(p, torch.tensor([0.55, 0.45, 0, 0]))
    p.backward(torch.tensor([1.0, 2.0, 4.0, 8.0], device=device))
    assert_close(x.grad, torch.tensor([-0.5, 0.5, 0, 0]))


def test_dispatcher(device):
    check_dispatcher(
        torch.ops.vmoe_routers.ksparse_projection.default,
        [spread(3, 6).to(device).requires_grad_(), 2],
    )


def test_dispatcher_of_the_backward(device):
    out = ksparse_projection(spread(2, 3, 6), 2).mT.to(device)
    grad = torch.randn_like(out).requires_grad_()
    check_dispatcher(torch.ops.vmoe_routers.ksparse_projection_backward.default, [grad, out])


def test_compile(device):
    check_compile(ksparse_projection, [spread(2, 3, 6, scale=0.3), 3], device)


@each_dtype
@pytest.mark.parametrize("k", [1, 5, 100])
def test_is_in_the_simplex_with_k_non_zeros(device, dtype, k):
    p = ksparse_projection(spread(50, 100, scale=0.3).to(device, dtype), k)
    assert (p >= 0).all()
    assert ((p > 0).sum(1) <= k).all()
    assert_close(p.double().sum(1), torch.ones(50), dtype=dtype, slack=4)


def test_k_of_one_is_one_hot(device):
    x = tied(20, 9).to(device)
    first = reference.topk(x, 1)[1].long()
    assert torch.equal(ksparse_projection(x, 1), torch.zeros_like(x).scatter(1, first, 1.0))


def test_a_point_of_the_simplex_is_unchanged(device):
    x = spread(20, 9).softmax(1).to(device)
    assert_close(ksparse_projection(x, 9), x)


def test_ties_at_the_edge_of_the_k_go_to_the_lower_index(device):
    p = ksparse_projection(torch.tensor([0.1, 0.3, 0.2, 0.3, 0.2, 0.2], device=device), 3)
    assert (p > 0).tolist() == [False, True, True, True, False, False]
    p = ksparse_projection(torch.zeros(1, 7, device=device), 4)
    assert_close(p, torch.tensor([[0.25] * 4 + [0] * 3]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_values(device, dtype, size):
    x = torch.tensor([[1.0, 1.0, 0.0, -1.0], [1.0, 0.5, 0.25, -1.0]], dtype=torch.float64) * size
    check_reference(ksparse_projection, reference.ksparse_projection, [x, 3], dtype, device)
    # A shift of any size changes nothing: 0, 1/4 and 1/2 above 4096 are exact in float32.
    if dtype in (torch.float32, torch.float64):
        low = torch.tensor([[0.5, 0.25, 0.0, 0.25]], dtype=dtype, device=device)
        assert_close(ksparse_projection(low + 4096, 4), ksparse_projection(low, 4))


def test_minus_infinity_gets_no_mass(device):
    """Entries of -inf are 0 in the projection, also if k exceeds the number of finite entries."""
    x = torch.tensor([[-INF, 0.25, -INF, 0.0], [-INF, -INF, -INF, -9.0]], device=device, requires_grad=True)
    p = ksparse_projection(x, 3)
    assert_close(p, torch.tensor([[0, 0.625, 0, 0.375], [0, 0, 0, 1]]))
    p.square().sum().backward()
    assert_close(x.grad, torch.tensor([[0, 0.25, 0, -0.25], [0, 0, 0, 0]]))


@pytest.mark.parametrize("special", [[NAN, 0, 0, 0], [0, NAN, -INF, NAN], [0, INF, 0, 0], [INF] * 4, [-INF] * 4])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_row_without_a_projection_is_nan(device, special, k):
    x = torch.tensor([special, [0.0, 0.0, -2.0, -2.0]], device=device)
    for project in (reference.ksparse_projection, ksparse_projection):
        p = project(x, k)
        assert p[0].isnan().all()
        assert_close(p[1], torch.tensor([1.0, 0, 0, 0] if k == 1 else [0.5, 0.5, 0, 0]))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (2, 1), (1,)])
def test_empty_and_one(device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    p = ksparse_projection(x, 1)
    assert p.shape == shape
    p.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))
    if shape[-1] == 1:
        assert (p == 1).all()


def test_not_contiguous(device):
    x = spread(4, 5, 6, scale=0.3).to(device)
    cotangent = torch.randn_like(x)
    wanted = None
    for view in (x, strided(x), x.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        leaf = view.detach().requires_grad_()
        p = ksparse_projection(leaf, 3)
        p.backward(strided(cotangent))
        wanted = wanted or (p, leaf.grad)
        assert torch.equal(p, wanted[0])
        assert torch.equal(leaf.grad, wanted[1])


def test_permutation(device):
    x, permutation = spread(4, 30, scale=0.3).to(device), torch.randperm(30)
    assert_close(ksparse_projection(x[:, permutation], 5), ksparse_projection(x, 5)[:, permutation])


def test_refuses():
    x = torch.randn(2, 5)
    for k in (0, -1, 6, 1.5, None):
        with refused(OP, "k"):
            ksparse_projection(x, k)
    for wrong in (x.long(), torch.tensor(1.0), [1.0, 2.0], torch.randn(3, 0)):
        with refused(OP, "x"):
            ksparse_projection(wrong, 1)
