"""Capacity, and the methods of a routing: dispatch, combine, dense tensors, metrics, refusals."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_routers as vr
from vmoe_routers.routers.choice import _exported_slots
from vmoe_routers.routers.gates import PlainGates

SHAPE = (3, 7, 5)  # G, T, E


def gates(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).softmax(-1)


def some_mask(groups, tokens):
    mask = torch.ones(groups, tokens, dtype=torch.bool)
    mask[0, 1] = mask[0, 4] = mask[1, 0] = mask[-1, -1] = False
    return mask


def make(kind, mask=None):
    if kind == "soft":
        logits = torch.randn(3, 7, 10, dtype=torch.float64)
        return vr.SoftRouting(logits if mask is None else logits.masked_fill(~mask[..., None], -math.inf), 5, mask)
    if kind == "expert_choice":
        return vr.expert_choice(gates(*SHAPE), 2, weights=gates(*SHAPE), mask=mask)
    return vr.token_choice(gates(*SHAPE), 2, 2, weights=gates(*SHAPE), mask=mask)


KINDS = ("token_choice", "expert_choice", "soft")


# Capacity


def naive_capacity(tokens, experts, factor, rounding, multiple):
    exact = Fraction(tokens) * Fraction(factor) / experts
    slots = math.ceil(exact) if rounding == "ceil" else round(exact)  # half to even
    slots = max(slots, 1)
    while multiple > 1 and slots % multiple:
        slots += 1
    return slots


@pytest.mark.parametrize("rounding", ["ceil", "round"])
@pytest.mark.parametrize("multiple", [0, 1, 2, 4, 8])
def test_capacity_is_the_rounded_share(rounding, multiple):
    for tokens in (0, 1, 2, 3, 6, 10, 49, 196, 392):
        for experts in (1, 2, 4, 7, 32):
            for factor in (0.125, 0.5, 1, 1.25, 2):  # exact in binary
                wanted = naive_capacity(tokens, experts, factor, rounding, multiple)
                assert vr.capacity(tokens, experts, factor, rounding, multiple) == wanted
                assert _exported_slots(tokens, experts, factor, rounding, multiple) == wanted


def test_capacity_defaults_and_halves():
    assert vr.capacity(49, 8, 1.0) == 8  # ceil(6.125) = 7, then a multiple of 4
    assert vr.capacity(10, 4, 1.0, "round", 1) == 2  # 2.5 to even
    assert vr.capacity(14, 4, 1.0, "round", 1) == 4  # 3.5 to even
    assert vr.capacity(1, 32, 1.0, "round", 1) == 1  # 0 becomes 1
    assert vr.capacity(1, 32, 1.0, "round", 4) == 4
    assert isinstance(vr.capacity(10, 4, 0.7), int)


def test_capacity_runs_no_op_of_torch():
    class NoOp(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise AssertionError(function)

    with NoOp():
        assert vr.capacity(49, 8, 1.0) == 8


def test_numpys_numbers_are_numbers():
    slots = vr.capacity(np.int64(10), np.int32(4), np.float32(1.0), multiple_of=np.int64(4))
    assert slots == 4
    assert type(slots) is int
    gates = torch.rand(2, 5, 4)
    assert vr.token_choice(gates, np.int64(2), np.int64(3)).capacity == 3
    assert torch.equal(vr.sinkhorn(gates, epsilon=np.float32(0.5)), vr.sinkhorn(gates, epsilon=0.5))
    layer = vr.MoEMlp(
        np.int64(6),
        np.int64(8),
        num_experts=np.int64(4),
        router="softmax_token_choice",
        group_size=np.int64(2),
        top_k=np.int64(2),
        capacity_factor=np.float32(1.5),
    )
    assert layer(torch.rand(2, 5, 6)).shape == (2, 5, 6)
    soft = vr.create_router("soft", np.int64(6), np.int64(4), capacity_factor=np.float32(1), num_tokens=np.int64(8))
    assert soft.slots_per_expert == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, 4, 1.0), ValueError, "tokens.* -1"),
        ((2.5, 4, 1.0), TypeError, "tokens.*int.*float"),
        ((8, 0, 1.0), ValueError, "num_experts.* 0"),
        ((8, "4", 1.0), TypeError, "num_experts.*int.*str"),
        ((8, 4, 0), ValueError, "factor.*> 0.* 0"),
        ((8, 4, -1.0), ValueError, "factor.*> 0.* -1"),
        ((8, 4, math.nan), ValueError, "factor.*nan"),
        ((8, 4, math.inf), ValueError, "factor.*inf"),
        ((8, 4, "1"), TypeError, "factor.*number.*str"),
        ((8, 4, 1.0, "floor"), ValueError, "rounding.*'ceil', 'round'.*'floor'"),
        ((8, 4, 1.0, "ceil", -4), ValueError, "multiple_of.* -4"),
        ((8, 4, 1.0, "ceil", True), TypeError, "multiple_of.*int.*bool"),
    ],
)
def test_capacity_refuses(arguments, error, words):
    with pytest.raises(error, match=f"^capacity: {words}"):
        vr.capacity(*arguments)


# Dispatch and combine


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_and_combine_are_the_dense_tensors(kind, masked):
    routing = make(kind, some_mask(3, 7) if masked else None)
    G, T, E, C = 3, 7, 5, 2
    D, B = routing.dispatch_tensor(), routing.combine_tensor()
    assert D.shape == B.shape == (G, T, E, C)
    assert (routing.num_groups, routing.num_tokens) == (G, T)
    assert (routing.num_experts, routing.capacity) == (E, C)
    x = torch.randn(G, T, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(E, G, C, 4, dtype=torch.float64, requires_grad=True)
    slots, out = torch.zeros(E, G, C, 3).double(), torch.zeros(G, T, 4).double()
    for g in range(G):
        for t in range(T):
            for e in range(E):
                for c in range(C):
                    slots[e, g, c] = slots[e, g, c] + D[g, t, e, c] * x[g, t]
                    out[g, t] = out[g, t] + B[g, t, e, c] * y[e, g, c]
    torch.testing.assert_close(routing.dispatch(x), slots, atol=1e-12, rtol=0)
    torch.testing.assert_close(routing.combine(y), out, atol=1e-12, rtol=0)
    for ours, theirs, at in ((routing.dispatch(x), slots, x), (routing.combine(y), out, y)):
        v = torch.randn_like(ours)
        (wanted,) = torch.autograd.grad(theirs, at, v, retain_graph=True)
        (got,) = torch.autograd.grad(ours, at, v)
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_filled_slots(kind, masked):
    routing = make(kind, some_mask(3, 7) if masked else None)
    if kind == "soft":
        assert routing.filled is None
        return
    assert routing.filled.dtype == torch.int32
    assert torch.equal(routing.filled, routing.metrics["load"].int())


def test_filled_ends_at_the_last_token():
    token = torch.tensor([[[2, -1, 0, -1], [-1, -1, -1, -1], [-1, -1, -1, 1]]], dtype=torch.int32)

    def filled(token):
        gates_, places = PlainGates(gates(1, 3, 3)), vr.ops.invert_slots(token, 3)
        return vr.SparseRouting(token, (token >= 0).double(), gates_, *places, None, None, None, {}, {}).filled

    assert filled(token).tolist() == [[3, 0, 4]]
    assert filled(token[..., :0]).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dispatch_and_combine_keep_the_dtype(kind, dtype):
    routing = make(kind)
    x, y = torch.randn(3, 7, 3), torch.randn(5, 3, 2, 4)
    tolerance = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}[dtype]
    for function, value in ((routing.dispatch, x), (routing.combine, y)):
        narrow = function(value.to(dtype))
        assert narrow.dtype == dtype
        wide = function(value.to(dtype).double())
        torch.testing.assert_close(narrow.double(), wide, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_and_combine_take_any_strides(kind):
    routing = make(kind)
    x, y = torch.randn(3, 7, 6).double(), torch.randn(5, 3, 2, 8).double()
    for function, value in ((routing.dispatch, x), (routing.combine, y)):
        strided = torch.empty(*value.shape[:-1], 2 * value.shape[-1]).double()[..., ::2]
        strided.copy_(value)
        assert torch.equal(function(strided), function(value))
        turned = value.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(function(turned), function(value))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "value", "error", "words"),
    [
        ("dispatch", torch.zeros(3, 6, 4), ValueError, r"3, 7, 4.*3, 6, 4"),
        ("dispatch", torch.zeros(2, 7, 4), ValueError, r"3, 7, 4.*2, 7, 4"),
        ("dispatch", torch.zeros(7, 4), ValueError, r"3 axes.*7, 4"),
        ("dispatch", torch.zeros(3, 7, 4).int(), TypeError, r"float.*int32"),
        ("dispatch", torch.zeros(3, 7, 4, device="meta"), ValueError, r"on meta.*on cpu|on cpu.*on meta"),
        ("dispatch", [[1.0]], TypeError, r"Tensor.*list"),
        ("combine", torch.zeros(5, 3, 3, 4), ValueError, r"5, 3, 2, 4.*5, 3, 3, 4"),
        ("combine", torch.zeros(3, 5, 2, 4), ValueError, r"5, 3, 2, 4.*3, 5, 2, 4"),
        ("combine", torch.zeros(5, 2, 4), ValueError, r"4 axes.*5, 2, 4"),
        ("combine", torch.zeros(5, 3, 2, 4).long(), TypeError, r"float.*int64"),
        ("combine", torch.zeros(5, 3, 2, 4, device="meta"), ValueError, r"on meta.*on cpu|on cpu.*on meta"),
        ("combine", None, TypeError, r"Tensor.*NoneType"),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else None,
)
def test_refusals_name_the_argument(kind, method, value, error, words):
    routing = make(kind)
    with pytest.raises(error, match=words) as raised:
        getattr(routing, method)(value)
    name = "x" if method == "dispatch" else "y"
    assert f" {name} " in str(raised.value)


# Metrics


def naive_metrics(routing, table, mask):
    """Computes the metrics by counting in the dense dispatch tensor and in the table of gates [G, T, E]."""
    D = routing.dispatch_tensor()
    G, T, E, C = D.shape
    load = [[0] * E for _ in range(G)]
    taken, entropies = [], []
    for g in range(G):
        for t in range(T):
            for e in range(E):
                load[g][e] += int(D[g, t, e].sum())
            if mask is None or mask[g, t]:
                taken.append(bool(D[g, t].any()))
                p = [float(v / table[g, t].sum()) for v in table[g, t]]
                entropies.append(-sum(v * math.log(v) for v in p if v > 0))
    total = [sum(load[g][e] for g in range(G)) for e in range(E)]
    mean = sum(total) / E
    std = math.sqrt(sum((v - mean) ** 2 for v in total) / E)
    return {
        "load": load,
        "utilisation": sum(total) / (G * E * C),
        "load_cv": std / mean,
        "entropy": sum(entropies) / len(entropies),
        "dropped": 1 - sum(taken) / len(taken),
        "dead_experts": sum(v == 0 for v in total),
    }


def assert_metrics(got, wanted):
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert not got[name].requires_grad
        torch.testing.assert_close(got[name].double(), torch.tensor(value).double(), atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("slots", [1, 2, 9])
def test_metrics_of_token_choice(top_k, slots, masked):
    # Expert 4 is last for every token: dead at K < 5.
    select = gates(*SHAPE)
    select[..., 4] = 0
    weights = gates(*SHAPE).requires_grad_()
    mask = some_mask(3, 7) if masked else None
    routing = vr.token_choice(select, top_k, slots, weights=weights, mask=mask)
    wanted = naive_metrics(routing, weights.detach(), mask)
    requests = top_k * (int(mask.sum()) if masked else 21)
    wanted["dropped_requests"] = 1 - float(routing.dispatch_tensor().sum()) / requests
    assert wanted["dead_experts"] == 1
    assert slots != 1 or wanted["dropped_requests"] > 0
    assert_metrics(routing.metrics, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_stays_in_the_row_of_its_token(value):
    weights = torch.full((1, 3, 2), 0.5)
    weights[0, 1, 0] = value
    routing = vr.token_choice(torch.ones(1, 3, 2), 1, 3, weights=weights)
    wanted = torch.zeros(1, 3, 2, 3)
    wanted[0, 0, 0, 0] = wanted[0, 2, 0, 2] = 0.5
    wanted[0, 1, 0, 1] = value
    torch.testing.assert_close(routing.combine_tensor(), wanted, equal_nan=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 7])
def test_metrics_of_expert_choice(slots, masked):
    mask = some_mask(3, 7) if masked else None
    weights = gates(*SHAPE)
    routing = vr.expert_choice(gates(*SHAPE), slots, weights=weights, mask=mask)
    wanted = naive_metrics(routing, weights.detach(), mask)
    assert slots != 1 or wanted["dropped"] > 0
    assert_metrics(routing.metrics, wanted)


@pytest.mark.parametrize("masked", [False, True])
def test_metrics_of_soft(masked):
    mask = some_mask(3, 7) if masked else None
    routing = make("soft", mask)
    B = routing.combine_tensor()
    load = B.sum((1, 3))  # the sum of the tokens' weights of an expert
    total = load.sum(0)
    entropies = []
    for g in range(3):
        for t in range(7):
            if mask is None or mask[g, t]:
                p = B[g, t].sum(-1)
                entropies.append(-(p * p.log()).sum().item())
    wanted = {
        "load": load.tolist(),
        "utilisation": 1.0,
        "load_cv": float(((total - total.mean()) ** 2).mean().sqrt() / total.mean()),
        "entropy": sum(entropies) / len(entropies),
        "dropped": 0.0,
        "dead_experts": 0,
    }
    assert_metrics(routing.metrics, wanted)


class Dense(vr.Routing):
    """A user's routing that has only the two dense tensors."""

    def __init__(self, routing):
        self.tensors = routing.dispatch_tensor(), routing.combine_tensor()
        self.num_groups, self.num_tokens, self.num_experts, self.capacity = self.tensors[0].shape
        self.mask = routing.mask

    def dispatch(self, x):
        return torch.einsum("gtec,gtd->egcd", self.tensors[0], x)

    def combine(self, y):
        return torch.einsum("gtec,egcd->gtd", self.tensors[1], y)

    def dispatch_tensor(self):
        return self.tensors[0]

    def combine_tensor(self):
        return self.tensors[1]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_metrics_of_an_own_routing(top_k, masked):
    select = gates(*SHAPE)
    select[..., 4] = 0
    sparse = vr.token_choice(select, top_k, 1, mask=some_mask(3, 7) if masked else None)
    # Only the experts that took a token have a weight in its output.
    wanted = naive_metrics(sparse, sparse.combine_tensor().sum(-1), sparse.mask)
    assert wanted["dropped"] > 0 and wanted["dead_experts"] == 1
    assert_metrics(Dense(sparse).metrics, wanted)


@pytest.mark.parametrize("kind", ["token choice", "expert choice", "soft", "own"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_of_16_bit_gates_count_in_float32(kind, dtype):
    table = gates(1, 4099, 2).to(dtype)  # neither dtype holds 2049 or 4099

    def routing(table):
        if kind == "token choice":
            return vr.token_choice(table, 1, 4099)
        if kind == "soft":
            return vr.SoftRouting(table.repeat(1, 1, 257), 2)
        chosen = vr.expert_choice(table, 2049)
        return Dense(chosen) if kind == "own" else chosen

    got, wanted = routing(table).metrics, routing(table.float()).metrics
    for name, value in wanted.items():
        tolerance = {"atol": 5e-3, "rtol": 2e-3} if kind == "soft" else {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(got[name], value, **tolerance, msg=name)


def test_metrics_of_one_token_in_one_slot():
    one = torch.tensor([[True, False]])
    table = gates(1, 2, 3)
    routing = vr.token_choice(table, 1, 1, mask=one)
    assert_metrics(routing.metrics, naive_metrics(routing, table, one) | {"dropped_requests": 0.0})
    alone = vr.token_choice(gates(1, 1, 1), 1, 1)
    assert alone.metrics["utilisation"] == 1


def test_metrics_without_requests():
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    for routing in (
        vr.token_choice(gates(2, 4, 3), 2, 2, mask=nothing),
        vr.token_choice(gates(2, 0, 3), 2, 2),
        vr.token_choice(gates(0, 4, 3), 2, 2),
        vr.expert_choice(gates(2, 4, 3), 2, mask=nothing),
        vr.expert_choice(gates(2, 0, 3), 2),
        vr.expert_choice(gates(0, 4, 3), 2),
        vr.SoftRouting(torch.zeros(2, 4, 6), 3, nothing),
        vr.SoftRouting(torch.zeros(2, 0, 6), 3),
        vr.SoftRouting(torch.zeros(0, 4, 6), 3),
    ):
        metrics = routing.metrics
        assert all(value.isfinite().all() for value in metrics.values())
        assert metrics["load"].sum() == metrics["dropped"] == metrics["entropy"] == 0
        assert metrics["dead_experts"] == 3
        assert metrics.get("dropped_requests", 0) == 0, "without requests, no request is dropped"


def test_metrics_and_losses_are_computed_only_when_read(monkeypatch):
    calls = []

    def count(name, returns=None):
        def counted(*args, **kwargs):
            calls.append(name)
            return returns(*args, **kwargs) if returns else torch.tensor(2.0)

        return counted

    monkeypatch.setattr(vr.SparseRouting, "usage", count("metrics", vr.SparseRouting.usage))
    routing = vr.token_choice(
        gates(*SHAPE),
        1,
        2,
        losses={"used": count("used"), "unused": count("unused")},
        loss_weights={"used": 0.5, "unused": 0.0},
    )
    routing.combine(routing.dispatch(torch.randn(3, 7, 4)))
    assert calls == []
    assert routing.aux_loss == 1.0
    assert calls == ["used"], "a loss of weight 0 is not computed"
    calls.clear()
    assert routing.losses == {"used": 2.0, "unused": 2.0}
    assert sorted(calls) == ["unused", "used"]
    calls.clear()
    assert routing.metrics["load"].sum() > 0
    assert calls == ["metrics"]


def test_a_routing_without_losses():
    for routing in (make(kind) for kind in KINDS):
        assert routing.losses == {}
        assert routing.aux_loss == 0
        assert routing.aux_loss.shape == ()


@pytest.mark.parametrize("name", vr.ROUTERS)
def test_aux_loss_is_on_the_routings_device(name):
    router = vr.create_router(name, 4, 2).to("meta").eval()
    assert router(torch.zeros(1, 6, 4, device="meta")).aux_loss.device.type == "meta"
