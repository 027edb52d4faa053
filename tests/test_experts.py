"""Experts: the cases that `ops.grouped_mlp` computes, and the cases that torch computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_routers as vr
from vmoe_routers.experts import GeluTanh, by_products
from vmoe_routers.ops import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
ACTS = {
    "gelu_tanh": (GeluTanh, reference.GELU_TANH),
    "gelu": (nn.GELU, F.gelu),
    "tanh": (nn.Tanh, torch.tanh),
    "relu": (nn.ReLU, F.relu),
}
each_act = pytest.mark.parametrize("act", ACTS)


def make(E=3, D=4, hidden=7, out=6, act="gelu_tanh", *, bias=True, dtype=torch.float64, device="cpu") -> vr.Experts:
    experts = vr.Experts(E, D, hidden, out, ACTS[act][0], bias=bias, device=device, dtype=dtype).eval()
    with torch.no_grad():
        for b in (experts.b1, experts.b2):
            if b is not None:
                b.normal_()
    return experts


def leaves(experts: vr.Experts) -> list[Tensor | None]:
    return [experts.w1, experts.b1, experts.w2, experts.b2]


def kept(filled: Tensor, slots: int) -> Tensor:
    """Returns a mask [E, G, C, 1], True where a slot is filled."""
    return (torch.arange(slots, device=filled.device) < filled.t()[..., None])[..., None]


@each_dtype
@each_act
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    ("E", "G", "C", "D", "hidden", "out_width"), [(3, 2, 5, 4, 7, 6), (1, 1, 1, 1, 1, 1), (8, 3, 11, 16, 64, 10)]
)
def test_values_and_gradients(device, dtype, act, bias, ragged, E, G, C, D, hidden, out_width):
    experts = make(E, D, hidden, out_width, act, bias=bias, dtype=dtype, device=device)
    x = torch.randn(E, G, C, D, device=device).to(dtype).requires_grad_()
    filled = torch.randint(C + 1, (G, E), dtype=torch.int32, device=device) if ragged else None
    # The reference computes with the same rounded numbers, in float64.
    exact = [None if p is None else p.detach().cpu().double().requires_grad_() for p in (x, *leaves(experts))]
    wanted = reference.grouped_mlp(exact[0].flatten(1, 2), *exact[1:], ACTS[act][1]).unflatten(1, (G, C))
    wanted = wanted if filled is None else wanted * kept(filled.cpu(), C)
    out = experts(x, filled)
    assert (out.dtype, out.shape, out.device.type) == (dtype, (E, G, C, out_width), device)
    cotangent = torch.randn(out.shape).double().to(dtype)
    ours = [p for p in (x, *leaves(experts)) if p is not None]
    gradients = torch.autograd.grad(out, ours, cotangent.to(device))
    exact_gradients = torch.autograd.grad(wanted, [p for p in exact if p is not None], cotangent.double())
    # A product in 16 bits rounds the hidden layer too, and its gradient.
    slacks = (8, *[64] * len(ours)) if dtype in HALVES else [16] * (1 + len(ours))
    for got, want, slack in zip((out, *gradients), (wanted, *exact_gradients), slacks, strict=True):
        assert got.dtype == dtype
        atol = slack * torch.finfo(dtype).eps * max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.detach().cpu().double(), want.detach(), rtol=0, atol=atol)
    if filled is not None:
        empty = ~kept(filled, C)
        assert out.masked_select(empty).count_nonzero() == 0
        assert gradients[0].masked_select(empty).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize(
    ("slots", "counts"),
    [
        # [E, G]; over a block of rows and in many pieces
        (12, [[12], [0], [7]]),
        (4, [[4, 4, 4], [0, 3, 0], [1, 0, 4]]),
        (80, [[80, 80, 80, 80, 80], [80, 0, 61, 80, 3], [0, 0, 0, 0, 0]]),
        (900, [[900, 900], [850, 17], [2, 899]]),
    ],
)
def test_filled_slots_are_those_of_the_padded_form(device, slots, counts, dtype, act):
    experts = make(hidden=9, act=act, dtype=dtype, device=device)
    filled = torch.tensor(counts, dtype=torch.int32, device=device).t().contiguous()
    x = torch.randn(3, len(counts[0]), slots, 4, device=device).to(dtype).requires_grad_()
    out = experts(x, filled)
    padded = by_products(x.flatten(1, 2), *leaves(experts), None, ACTS[act][1]).view_as(out)
    tolerance = {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, padded * kept(filled, slots), **tolerance)
    cotangent = torch.randn_like(out)
    inputs = [x, *leaves(experts)]
    gradients = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(padded, inputs, cotangent * kept(filled, slots))
    for gradient, other in zip(gradients, wanted, strict=True):
        size = max(1.0, other.abs().max().item())
        torch.testing.assert_close(gradient / size, other / size, **tolerance)


@each_act
def test_gradcheck(act):
    experts = make(2, 2, 3, 2, act)
    x = torch.randn(2, 2, 3, 2).double().requires_grad_()
    filled = torch.tensor([[2, 1], [0, 3]], dtype=torch.int32)
    names = [name for name, _ in experts.named_parameters()]

    def call(x, *parameters):
        with torch.nn.utils.stateless._reparametrize_module(experts, dict(zip(names, parameters, strict=True))):
            return experts(x, filled)

    assert torch.autograd.gradcheck(call, (x, *(p.detach().requires_grad_() for p in experts.parameters())))


@each_act
def test_dropout(device, act):
    experts = vr.Experts(3, 4, 7, 6, ACTS[act][0], 0.5, device=device)
    x = torch.randn(3, 2, 50, 4, device=device)
    out = experts(x)
    assert 0.3 < (out == 0).float().mean() < 0.7, "after the second layer"
    torch.manual_seed(3)
    first = experts(x)
    torch.manual_seed(3)
    assert torch.equal(experts(x), first)
    w1, b1, w2, b2 = leaves(experts)
    torch.manual_seed(3)
    hidden = experts.drop(ACTS[act][1](torch.baddbmm(b1[:, None], x.flatten(1, 2), w1)))
    wanted = experts.drop(torch.baddbmm(b2[:, None], hidden, w2)).view_as(first)
    torch.testing.assert_close(first, wanted)


@pytest.mark.parametrize("act", ["gelu_tanh", "relu"])
def test_autocast(device, act):
    experts = make(act=act, dtype=torch.float32, device=device)
    x = torch.randn(3, 1, 5, 4, device=device, requires_grad=True)
    inputs = [x, *leaves(experts)]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = experts(x)
        products = by_products(x.flatten(1, 2), *leaves(experts), None, ACTS[act][1])
    assert out.dtype == torch.bfloat16
    # CPU experts are torch's products. CUDA experts are the op, on inputs that autocast has converted.
    rounded = [a.bfloat16() for a in inputs]
    if device == "cuda" and act == "gelu_tanh":
        products = vr.ops.grouped_mlp(rounded[0].flatten(1, 2), *rounded[1:])
    assert torch.equal(out.flatten(1, 2), products)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    for gradient, other in zip(
        gradients, torch.autograd.grad(products, inputs, torch.ones_like(products)), strict=True
    ):
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, other)


@contextmanager
def autocast_on_cuda(dtype: torch.dtype) -> Iterator[None]:
    """Enables autocast for CUDA also without a GPU, where torch.autocast only warns."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


class Called(TorchDispatchMode):
    """Records the calls below autograd: the op and the dtypes of its inputs."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}))
        return func(*args, **(kwargs or {}))


@each_dtype
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_cuda_takes_the_op(dtype, autocast):
    """Runs on fake tensors, which have no values and need no GPU."""
    with FakeTensorMode():
        experts = make(dtype=dtype, device="cuda", act="gelu")
        x = torch.empty(3, 2, 3, 4, dtype=dtype, device="cuda", requires_grad=True)
        filled = torch.ones(2, 3, dtype=torch.int32, device="cuda")
        with nullcontext() if autocast is None else autocast_on_cuda(autocast), Called() as called:
            out = experts(x, filled)
    computed = dtype if autocast is None or dtype == torch.float64 else autocast
    assert (out.device.type, out.dtype, out.shape) == ("cuda", computed, (3, 2, 3, 6))
    assert out.requires_grad
    casts = [("aten._to_copy.default", {dtype})] * (0 if computed == dtype else 5)
    free = ("prim.device", "aten.view", "aten.t.", "aten._unsafe_view")
    calls = [one for one in called.calls if not one[0].startswith(free)]
    assert calls == [*casts, ("vmoe_routers.grouped_mlp.default", {computed})]


# functorch's rules for forward mode use TorchScript, which is deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")
@pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "tanh"])
def test_transforms(act):
    experts = make(2, 2, 3, 2, act).requires_grad_(requires_grad=False)
    filled = torch.tensor([[1, 0], [3, 2]], dtype=torch.int32)
    x = torch.randn(2, 2, 3, 2).double()

    def loss(x):
        return experts(x, filled).square().sum()

    x.requires_grad_()
    (wanted,) = torch.autograd.grad(loss(x), x)
    x.requires_grad_(requires_grad=False)
    torch.testing.assert_close(torch.func.grad(loss)(x), wanted)
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(x.expand(3, *x.shape)), wanted.expand(3, *x.shape))
    tangent = torch.randn_like(x)
    _, moved = torch.func.jvp(loss, (x,), (tangent,))
    torch.testing.assert_close(moved, (wanted * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, moved)


def test_gradients_of_the_parameters_by_functorch():
    experts = make(2, 2, 3, 2)
    x = torch.randn(2, 2, 3, 2).double()
    parameters = dict(experts.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(experts, parameters, (x,)).square().sum()

    wanted = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for got, want in zip(torch.func.grad(loss)(parameters).values(), wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("act", ["gelu_tanh", "tanh"])
def test_export(act):
    experts = make(act=act, dtype=torch.float32)
    x = torch.randn(3, 2, 5, 4)
    program = torch.export.export(experts, (x,))
    torch.testing.assert_close(program.module()(x), experts(x))


@pytest.mark.parametrize("act", ["gelu_tanh", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compile(device, dtype, act):
    torch._dynamo.reset()
    experts = make(act=act, dtype=dtype, device=device)
    x = torch.randn(3, 2, 5, 4, device=device).to(dtype).requires_grad_()
    filled = torch.tensor([[5, 0, 3], [1, 4, 2]], dtype=torch.int32, device=device)
    results = []
    for call in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        out = call(x, filled)
        results.append([out, *torch.autograd.grad(out.square().sum(), [x, *leaves(experts)])])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("act", ["gelu_tanh", "tanh"])
@pytest.mark.parametrize("shape", [(3, 0, 5, 4), (3, 2, 0, 4)])
def test_empty(device, act, shape):
    experts = make(act=act, device=device)
    x = torch.randn(shape, device=device).double().requires_grad_()
    filled = torch.zeros(shape[1], 3, dtype=torch.int32, device=device)
    for counts in (None, filled):
        out = experts(x, counts)
        assert out.shape == (*shape[:3], 6)
        out.sum().backward()
        assert torch.equal(x.grad, torch.zeros_like(x))


def test_any_strides(device):
    experts = make(device=device)
    x = torch.randn(3, 2, 5, 4, device=device).double()
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(experts(turned), experts(x))
    wide = torch.empty(3, 2, 5, 8, device=device).double()[..., ::2].copy_(x)
    torch.testing.assert_close(experts(wide), experts(x))


def test_refuses():
    experts = make()
    x = torch.randn(3, 2, 5, 4).double()
    filled = torch.ones(2, 3, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(TypeError, match=r"^Experts: x must have the experts' dtype torch.float64, got torch\."):
            experts(x.to(dtype))
    for wrong in (filled[0], filled[:1], filled[:, :2], filled.t()):
        with pytest.raises(ValueError, match=r"^Experts: filled"):
            experts(x, wrong)
    for wrong in (filled.long(), filled.float(), [[1]]):
        with pytest.raises(TypeError, match=r"^Experts: filled"):
            experts(x, wrong)
    with pytest.raises(ValueError, match=r"^Experts: filled"):
        experts(x, filled.to("meta"))
    with pytest.raises(ValueError, match=r"^Experts: x"):
        experts(x.to("meta"))
    with pytest.raises(TypeError, match=r"^ExpertList: experts must be a sequence of nn.Modules, got int"):
        vr.ExpertList(3)
