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
    tied,
)

from vmoe_routers.ops import reference, softmax_gather, softmax_topk, topk

OP = "softmax_topk"
# k and dim: few, many and all picks.
CASES = [(1, 2), (2, 2), (8, 2), (9, 2), (13, 2), (1, 1), (6, 1), (9, 1), (70, 1)]


def gates_of(logits):
    """Returns all gates [G, T, E] as the kernels compute them."""
    every = torch.arange(logits.shape[2], dtype=torch.int32, device=logits.device)
    return softmax_gather(logits, every.expand(logits.shape).contiguous())


@each_dtype
@pytest.mark.parametrize(("k", "dim"), CASES)
def test_reference(device, dtype, k, dim):
    if dtype.itemsize == 2:  # rounding makes gates equal, which the test of ties covers
        inputs = [torch.randperm(2 * 70 * 13).view(2, 70, 13).double() / 256, k, dim]
        values, _ = softmax_topk(inputs[0].to(device, dtype), k, dim)
        wanted, _ = reference.softmax_topk(inputs[0].to(dtype).double(), k, dim)
        torch.testing.assert_close(values.cpu().double(), wanted, rtol=2**-8, atol=1e-5)
        return
    check_reference(softmax_topk, reference.softmax_topk, [spread(2, 70, 13), k, dim], dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "dim"), CASES)
@pytest.mark.parametrize("E", [13, 32])
def test_is_topk_of_the_gates_to_the_bit(device, dtype, k, dim, E):
    """Covers ties: equal logits, and gates that round to the same number or underflow."""
    logits = torch.cat([tied(3, 40, E), spread(3, 60, E, scale=80.0)], 1).to(device, dtype)
    logits[1] = logits[1, :1]
    values, indices = softmax_topk(logits, k, dim)
    wanted_values, wanted_indices = topk(gates_of(logits), k, dim)
    assert torch.equal(values, wanted_values)
    assert torch.equal(indices, wanted_indices)


@pytest.mark.parametrize("k", [4, 20, 1500])
def test_one_large_group(device, k):
    logits = torch.cat([spread(1, 1500, 5), tied(1, 700, 5)], 1).float().to(device)
    values, indices = softmax_topk(logits, k, 1)
    wanted_values, wanted_indices = topk(gates_of(logits), k, 1)
    assert torch.equal(values, wanted_values)
    assert torch.equal(indices, wanted_indices)


@pytest.mark.parametrize(("k", "dim"), [(2, 2), (5, 2), (3, 1), (6, 1)])
def test_gradient(k, dim):
    logits = torch.randperm(60).double().view(2, 6, 5) / 16
    check_gradient(softmax_topk, [logits, k, dim])
    mask = torch.tensor([[True, False, True, True, False, True], [False] * 6])
    check_gradient(softmax_topk, [logits, k, dim], mask=mask)


@pytest.mark.parametrize(("k", "dim"), CASES)
def test_mask(device, k, dim):
    mask = torch.rand(3, 70) > 0.4
    mask[1] = False
    check_reference(softmax_topk, reference.softmax_topk, [spread(3, 70, 13), k, dim], torch.float32, device, mask=mask)
    logits = spread(3, 70, 13).float().to(device)
    logits[~mask] = NAN  # masked logits never affect the result
    logits.requires_grad_()
    values, indices = softmax_topk(logits, k, dim, mask=mask.to(device))
    there = indices.cpu() >= 0
    assert torch.equal(values.cpu()[~there], torch.zeros((~there).sum()))
    if dim == 2:
        assert torch.equal(there, mask[..., None].expand(3, 70, k))
    else:
        assert torch.equal(there.sum(2), mask.sum(1).clamp(max=k)[:, None].expand(3, 13))
        assert mask[torch.arange(3)[:, None, None], indices.cpu().clamp(min=0).long()][there].all()
    values.sum().backward()
    assert torch.equal(logits.grad[~mask], torch.zeros_like(logits[~mask]))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("k", [2, 12])
@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_comes_first(device, k, dim, value):
    logits = torch.randn(2, 20, 12, device=device)
    clean = softmax_topk(logits, k, dim)
    logits[1, 5, 3] = value
    values, indices = softmax_topk(logits, k, dim)
    assert torch.equal(values[0], clean[0][0])
    if dim == 2:
        assert values[1, 5].isnan().all()
        assert indices[1, 5].tolist() == list(range(k)), "all gates of the token are NaN, and tie"
        assert not values[1, 6:].isnan().any()
    else:
        assert values[1, :, 0].isnan().all()
        assert (indices[1, :, 0] == 5).all()
        assert not values[1, :, 1:].isnan().any()


@pytest.mark.parametrize("dim", [1, 2])
def test_a_single_minus_inf_is_a_gate_of_zero(device, dim):
    logits = torch.zeros(1, 3, 3, device=device)
    logits[0, 1, 0] = logits[0, 1, 2] = -INF
    values, indices = softmax_topk(logits, 3, dim)
    assert (indices >= 0).all()
    torch.testing.assert_close(values.sum(), torch.tensor(3.0, device=device))
    assert indices[0, 1].tolist() == [1, 0, 2]


@pytest.mark.parametrize("dim", [1, 2])
def test_equal_tokens_tie_at_any_position(device, dim):
    logits = torch.randn(1, 1, 7, device=device).expand(1, 37, 7)
    values, indices = softmax_topk(logits, 5, dim)
    if dim == 2:
        assert torch.equal(values, values[:, :1].expand_as(values))
    else:
        assert indices.tolist() == [[list(range(5))] * 7]


def test_a_group_does_not_depend_on_the_others(device):
    logits = spread(5, 23, 6).float().to(device)
    for k, dim in ((2, 2), (4, 1)):
        whole = softmax_topk(logits, k, dim)
        for got, wanted in zip(softmax_topk(logits[3:4], k, dim), whole, strict=True):
            assert torch.equal(got[0], wanted[3])


@pytest.mark.parametrize(("k", "dim"), [(2, 2), (3, 1)])
def test_dispatcher(device, k, dim):
    logits = spread(2, 6, 5).float().to(device).requires_grad_()
    check_dispatcher(torch.ops.vmoe_routers.softmax_topk.default, [logits, k, dim])


@pytest.mark.parametrize(("k", "dim"), [(2, 2), (3, 1)])
def test_compile(device, k, dim):
    check_compile(softmax_topk, [spread(2, 6, 5), k, dim], device)


def test_no_tensor_of_the_size_of_the_gates_is_kept(device):
    logits = torch.randn(2, 50, 16, device=device, requires_grad=True)
    for k, dim in ((2, 2), (3, 1)):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x) or x, lambda x: x):
            softmax_topk(logits, k, dim)
        others = [x.numel() for x in kept if x.data_ptr() != logits.data_ptr()]
        assert sum(others) <= 2 * 50 * 2 + 2 * 2 * max(50, 16) * k


@pytest.mark.parametrize(
    ("shape", "k", "dim"),
    [((0, 5, 3), 2, 2), ((2, 0, 3), 2, 2), ((2, 0, 3), 0, 1), ((2, 4, 0), 0, 2), ((2, 4, 0), 2, 1), ((1, 1, 1), 1, 1)],
)
def test_empty_and_one(device, shape, k, dim):
    logits = torch.randn(shape, device=device, requires_grad=True)
    values, indices = softmax_topk(logits, k, dim)
    wanted = reference.softmax_topk(logits.detach(), k, dim)
    assert torch.equal(values, wanted[0])
    assert torch.equal(indices, wanted[1])
    values.sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("dim", [1, 2])
def test_not_contiguous(device, dim):
    logits = torch.randn(4, 6, 6, device=device)
    for view in (strided(logits), logits.transpose(1, 2), logits[:1].expand(4, 6, 6)):
        for got, wanted in zip(softmax_topk(view, 3, dim), softmax_topk(view.contiguous(), 3, dim), strict=True):
            assert torch.equal(got, wanted)


def test_only_the_values_have_a_gradient():
    logits = torch.randn(2, 5, 4, requires_grad=True)
    values, indices, norms = torch.ops.vmoe_routers.softmax_topk(logits, 2, 2)
    assert values.requires_grad and not indices.requires_grad and not norms.requires_grad


def test_refuses():
    logits = torch.randn(2, 5, 4)
    with refused(OP, "logits"):
        softmax_topk(logits[0], 1)
    with refused(OP, "logits"):
        softmax_topk(logits.int(), 1)
    for k in (0, 5, 1.5, None, True):
        with refused(OP, "k"):
            softmax_topk(logits, k)
    with refused(OP, "k"):
        softmax_topk(logits, 6, 1)
    for dim in (0, 3, -1, torch.tensor([1, 2])):
        with refused(OP, "dim"):
            softmax_topk(logits, 1, dim)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 5), [True]):
        with refused(OP, "mask"):
            softmax_topk(logits, 1, mask=mask)
