from __future__ import annotations

import pytest
import torch
from checks import check_compile, check_dispatcher, refused, strided
from torch import Tensor

from vmoe_routers.ops import invert_slots, reference

OP = "invert_slots"


def tokens_of_slots(G: int, T: int, E: int, C: int, *, empty: float = 0.3) -> Tensor:
    token = torch.randint(max(T, 1), (G, E, C), dtype=torch.int32)
    return torch.where(torch.rand(G, E, C) < empty, -1, token)


@pytest.mark.parametrize("G, T, E, C", [(2, 7, 3, 4), (1, 1, 1, 1), (3, 2, 5, 6), (2, 50, 3, 2), (32, 196, 8, 24)])
@pytest.mark.parametrize("empty", [0.0, 0.3, 1.0])
def test_definition(device, G, T, E, C, empty):
    token = tokens_of_slots(G, T, E, C, empty=empty)
    for invert in (reference.invert_slots, invert_slots):
        offsets, slots, filled = invert(token.to(device), T)
        assert offsets.dtype == slots.dtype == filled.dtype == torch.int32
        for row, last in zip(token.flatten(0, 1).tolist(), filled.flatten().tolist(), strict=True):
            assert last == max((c + 1 for c, holds in enumerate(row) if holds >= 0), default=0)
        assert offsets.shape == (G, T + 1)
        assert slots.shape == (G, E * C)
        for g in range(G):
            flat = token[g].flatten().tolist()
            held = [[s for s, holds in enumerate(flat) if holds == t] for t in range(T)] if T < 60 else None
            start, list_ = offsets[g].tolist(), slots[g].tolist()
            if held is not None:
                assert [list_[start[t] : start[t + 1]] for t in range(T)] == held
            there = [s for s, holds in enumerate(flat) if holds >= 0]
            assert list_[: len(there)] == sorted(there, key=lambda s: (flat[s], s))
            assert list_[len(there) :] == [-1] * (len(flat) - len(there))
            assert start[-1] == len(there)


def test_anything_out_of_range_is_an_empty_slot(device):
    token = torch.tensor([[[2, 7, -3], [0, 2**31 - 1, -(2**31)]]], dtype=torch.int32, device=device)
    for invert in (reference.invert_slots, invert_slots):
        offsets, slots, filled = invert(token, 3)
        assert filled.tolist() == [[1, 1]]
        assert offsets.tolist() == [[0, 1, 1, 2]]
        assert slots.tolist() == [[3, 0, -1, -1, -1, -1]]


def test_dispatcher(device):
    check_dispatcher(torch.ops.vmoe_routers.invert_slots.default, [tokens_of_slots(2, 5, 3, 2).to(device), 5])


def test_compile(device):
    check_compile(invert_slots, [tokens_of_slots(2, 5, 3, 2), 5], device)


@pytest.mark.parametrize("G, T, E, C", [(0, 4, 3, 2), (2, 4, 3, 0), (2, 4, 0, 3), (2, 0, 3, 2)])
def test_empty(device, G, T, E, C):
    token = torch.full((G, E, C), -1, dtype=torch.int32, device=device)
    offsets, slots, filled = invert_slots(token, T)
    assert torch.equal(filled.cpu(), torch.zeros(G, E, dtype=torch.int32))
    assert torch.equal(offsets.cpu(), torch.zeros(G, T + 1, dtype=torch.int32))
    assert torch.equal(slots.cpu(), torch.full((G, E * C), -1, dtype=torch.int32))


def test_not_contiguous(device):
    token = tokens_of_slots(2, 7, 3, 4).to(device)
    wanted = invert_slots(token, 7)
    for view in (strided(token), token.transpose(0, 2).contiguous().transpose(0, 2)):
        assert all(torch.equal(a, b) for a, b in zip(invert_slots(view, 7), wanted, strict=True))


def test_refuses():
    token = tokens_of_slots(2, 5, 3, 2)
    with refused(OP, "token"):
        invert_slots(token[0], 5)
    with refused(OP, "token"):
        invert_slots(token.float(), 5)
    with refused(OP, "token"):
        invert_slots(token.tolist(), 5)
    for num_tokens in (-1, 2.5, None):
        with refused(OP, "num_tokens"):
            invert_slots(token, num_tokens)
