from __future__ import annotations

import pytest
import torch
from checks import DTYPES, INF, NAN, check_compile, check_dispatcher, refused, strided, tied
from torch import Tensor

from vmoe_routers.ops import assign_slots, reference

OP = "assign_slots"


def requests(G: int, T: int, K: int, E: int, *, skew: float = 1.0, none: float = 0.1) -> Tensor:
    """Returns requests: different experts per token, some experts more often requested, and some invalid requests."""
    demand = torch.rand(G, T, E) ** (1 + skew * torch.arange(E)) if skew else torch.rand(G, T, E)
    expert = demand.argsort(-1, descending=True)[..., :K].int()
    return torch.where(torch.rand(G, T, K) < none, -1, expert)


def serve(expert: Tensor, E: int, C: int, priority: Tensor | None = None) -> tuple[list, list]:
    """Assigns slots by the definition in plain Python, one request after another."""
    G, T, K = expert.shape
    slot = [[[-1] * K for _ in range(T)] for _ in range(G)]
    source = [[[-1] * C for _ in range(E)] for _ in range(G)]
    for g in range(G):
        order = list(range(T))
        if priority is not None:
            order.sort(key=lambda t: -priority[g, t].item())
        for k in range(K):
            for t in order:
                e = expert[g, t, k].item()
                if e >= 0 and -1 in source[g][e]:
                    position = source[g][e].index(-1)
                    source[g][e][position] = t * K + k
                    slot[g][t][k] = e * C + position
    return slot, source


CASES = [
    # G, T, K, E, C
    (2, 12, 1, 4, 3),
    (2, 12, 2, 4, 3),
    (3, 20, 3, 5, 2),
    (1, 9, 2, 2, 9),  # every request gets a slot
    (1, 9, 2, 2, 30),  # C > T
    (2, 3, 2, 7, 1),  # E > T
    (1, 1, 1, 1, 1),
    (1, 6, 1, 1, 4),
    (2, 8, 2, 4, 0),  # no slots at all
    (1, 5000, 2, 8, 700),
]


@pytest.mark.parametrize("G, T, K, E, C", CASES)
@pytest.mark.parametrize("priorities", ["none", "distinct", "tied"])
def test_definition(device, G, T, K, E, C, priorities):
    expert = requests(G, T, K, E)
    priority = {"none": None, "distinct": torch.randn(G, T), "tied": tied(G, T).float()}[priorities]
    wanted = serve(expert, E, C, priority)
    for assign in (reference.assign_slots, assign_slots):
        slot, source = assign(expert.to(device), E, C, None if priority is None else priority.to(device))
        assert slot.dtype == source.dtype == torch.int32
        assert slot.shape == (G, T, K)
        assert source.shape == (G, E, C)
        assert slot.tolist() == wanted[0]
        assert source.tolist() == wanted[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(device, dtype):
    """Experts get more requests than they have slots, many priorities tie, and several threads share the groups."""
    expert = requests(64, 300, 2, 16).to(device)
    priority = tied(64, 300, levels=50).to(device, dtype)
    for got, wanted in zip(
        assign_slots(expert, 16, 20, priority),
        reference.assign_slots(expert, 16, 20, priority),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_dispatcher(device):
    op = torch.ops.vmoe_routers.assign_slots.default
    expert = requests(2, 6, 2, 3).to(device)
    check_dispatcher(op, [expert, None, 3, 2])
    check_dispatcher(op, [expert, torch.randn(2, 6, device=device), 3, 2])


def test_compile(device):
    check_compile(assign_slots, [requests(2, 6, 2, 3), 3, 2], device)
    check_compile(assign_slots, [requests(2, 6, 2, 3), 3, 2, torch.randn(2, 6)], device)


def test_takes_no_gradient(device):
    expert = requests(1, 6, 2, 3).to(device)
    priority = torch.randn(1, 6, device=device, requires_grad=True)
    assert not any(out.requires_grad for out in assign_slots(expert, 3, 2, priority))


def test_priorities_of_float64_are_not_rounded(device):
    priority = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64, device=device)
    expert = torch.zeros(1, 2, 1, dtype=torch.int32, device=device)
    assert assign_slots(expert, 1, 1, priority)[1].tolist() == [[[1]]]


def test_special_priorities(device):
    priority = torch.tensor([[0.0, -INF, NAN, INF, -0.0, NAN]], device=device)
    expert = torch.zeros(1, 6, 1, dtype=torch.int32, device=device)
    _, source = assign_slots(expert, 1, 6, priority)
    assert source.flatten().tolist() == [2, 5, 3, 0, 4, 1]


@pytest.mark.parametrize("shape", [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
def test_empty(device, shape):
    slot, source = assign_slots(torch.zeros(shape, dtype=torch.int32, device=device), 3, 2)
    assert slot.shape == shape
    assert source.shape == (shape[0], 3, 2)
    assert (source == -1).all()


def test_the_same_expert_twice(device):
    """A token may request an expert twice; each request takes its own slot."""
    slot, source = assign_slots(torch.zeros(1, 2, 2, dtype=torch.int32, device=device), 1, 3)
    assert slot.tolist() == [[[0, 2], [1, -1]]]
    assert source.tolist() == [[[0, 2, 1]]]


def test_not_contiguous(device):
    expert, priority = requests(3, 10, 2, 4).to(device), tied(3, 10).to(device)
    wanted = assign_slots(expert, 4, 3, priority)
    views = [
        (strided(expert), strided(priority)),
        (expert.transpose(0, 2).contiguous().transpose(0, 2), priority.t().contiguous().t()),
    ]
    for expert_view, priority_view in views:
        assert all(
            torch.equal(a, b) for a, b in zip(assign_slots(expert_view, 4, 3, priority_view), wanted, strict=True)
        )


@pytest.mark.parametrize("batch_priority", [False, True])
def test_slots_and_sources_agree_and_capacity_holds(device, batch_priority):
    G, T, K, E, C = 4, 50, 2, 8, 9
    expert = requests(G, T, K, E).to(device)
    slot, source = assign_slots(expert, E, C, torch.randn(G, T, device=device) if batch_priority else None)
    for g in range(G):
        held = source[g].flatten()
        for s in range(E * C):
            if held[s] >= 0:
                assert slot[g].flatten()[held[s]] == s
                assert expert[g].flatten()[held[s]] == s // C
        assert (slot[g] >= 0).sum() == (held >= 0).sum()
        for e in range(E):
            wanted = (expert[g] == e).sum().item()
            assert (source[g, e] >= 0).sum() == min(C, wanted)
            filled = (source[g, e] >= 0).tolist()
            assert filled == sorted(filled, reverse=True), "buffers are filled from the front"


def test_batch_priority_drops_the_lowest_priorities(device):
    G, T, E, C = 4, 60, 6, 5
    expert = requests(G, T, 1, E, none=0).to(device)
    priority = torch.randn(G, T, device=device)
    slot = assign_slots(expert, E, C, priority)[0][..., 0]
    assert (slot < 0).any()
    for g in range(G):
        for e in range(E):
            mine = expert[g, :, 0] == e
            kept, dropped = priority[g][mine & (slot[g] >= 0)], priority[g][mine & (slot[g] < 0)]
            if len(dropped):
                assert kept.min() > dropped.max()


def test_first_choices_are_served_before_second_choices(device):
    """With any priority, token 1's second choice comes after token 0's first."""
    expert = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.int32, device=device)
    slot, _ = assign_slots(expert, 2, 1, torch.tensor([[0.0, 9.0]], device=device))
    assert slot.tolist() == [[[0, -1], [1, -1]]]


def test_permuted_tokens_with_distinct_priorities(device):
    G, T, K, E, C = 2, 30, 2, 5, 4
    expert, priority = requests(G, T, K, E).to(device), torch.rand(G, T, device=device)
    permutation = torch.randperm(T, device=device)
    slot, _ = assign_slots(expert, E, C, priority)
    permuted, _ = assign_slots(expert[:, permutation], E, C, priority[:, permutation])
    assert torch.equal(permuted, slot[:, permutation])


def test_capacity_beyond_the_requests(device):
    """A capacity above the number of requests is accepted if the group has few slots. Otherwise it is refused."""
    expert = torch.zeros(1, 5, 2, dtype=torch.int32, device=device)
    slot, source = assign_slots(expert, 4, 2**18)
    assert slot.flatten().tolist() == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]
    assert source[0, 0, :10].tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]
    assert (source[0, 0, 10:] == -1).all()
    assert (source[0, 1:] == -1).all()
    many = expert.expand(1, 13, 5, 2).reshape(1, 65, 2)
    assert assign_slots(many, 2**13, 130)[1].shape == (1, 2**13, 130)
    with pytest.raises(ValueError, match=r"capacity must be in \[0, 130\], got 131"):
        assign_slots(many, 2**13, 131)
    with pytest.raises(RuntimeError, match=r"capacity = 131, wanted 0 to 130 for 130 requests"):
        torch.ops.vmoe_routers.assign_slots(many, None, 2**13, 131)


def test_refuses():
    expert = torch.zeros(2, 4, 2, dtype=torch.int32)
    with refused(OP, "expert"):
        assign_slots(expert[0], 3, 2)
    with refused(OP, "expert"):
        assign_slots(expert.float(), 3, 2)
    with refused(OP, "expert"):
        assign_slots(expert.tolist(), 3, 2)
    for num_experts in (0, -1, 2.5, None, 2**20 + 1, 2**63 - 1):
        with refused(OP, "num_experts"):
            assign_slots(expert, num_experts, 2)
    for capacity in (-1, 2.5, None, 2**20 // 3 + 1, 10**9, 2**63 - 1):
        with refused(OP, "capacity"):
            assign_slots(expert, 3, capacity)
    with refused(OP, "priority"):
        assign_slots(expert, 3, 2, torch.rand(2, 5))
    with refused(OP, "priority"):
        assign_slots(expert, 3, 2, torch.rand(2, 4, 2))
    with refused(OP, "priority"):
        assign_slots(expert, 3, 2, torch.ones(2, 4, dtype=torch.int32))
    with refused(OP, "priority"):
        assign_slots(expert, 3, 2, torch.rand(2, 4, device="meta"))


def test_raw_ops_name_the_dtype():
    raw = torch.ops.vmoe_routers
    with pytest.raises(RuntimeError, match="assign_slots: expert has dtype Long, wanted Int"):
        raw.assign_slots(torch.zeros(1, 2, 1, dtype=torch.int64), None, 2, 1)
    with pytest.raises(RuntimeError, match="topk: dtype Int, wanted Float or Double"):
        raw.topk(torch.zeros(1, 2, dtype=torch.int32), 1, 1)
