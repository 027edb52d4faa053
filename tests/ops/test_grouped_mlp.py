from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from checks import (
    INF,
    NAN,
    assert_close,
    check_compile,
    check_dispatcher,
    check_gradient,
    check_reference,
    each_dtype,
    refused,
    strided,
    with_threads,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vmoe_routers.experts import GELU, by_products
from vmoe_routers.ops import grouped_mlp, reference
from vmoe_routers.ops.grouped_mlp import serves

OP = "grouped_mlp"

SHAPES = [
    # E, N, D, F, out
    (3, 5, 4, 7, 4),
    (1, 1, 1, 1, 1),
    (8, 33, 16, 64, 10),
]


each_act = pytest.mark.parametrize("act", GELU)


def served(device: str, dtype: torch.dtype) -> bool:
    """Tells whether the op has a kernel. `vr.Experts` computes all other cases (tests/test_experts.py)."""
    if serves(torch.empty(0, dtype=dtype, device=device)):
        return True
    with refused(OP, "x"):
        grouped_mlp(*(a.to(device, dtype) for a in arguments(3, 5, 4, 7, 4)))
    return False


def arguments(E: int, N: int, D: int, H: int, out: int, *, bias: bool = True) -> list[Tensor | None]:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    w1, w2 = normal(E, D, H) / D**0.5, normal(E, H, out) / H**0.5
    return [
        normal(E, N, D),
        w1,
        normal(E, H) if bias else None,
        w2,
        normal(E, out) if bias else None,
    ]


@each_act
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_of_huge_values(device, dtype, act):
    """The square of x overflows from 1.8e19 on (float64: 1e154), and the slope is still 0 or 1."""
    huge = torch.finfo(dtype).max / 8
    x = torch.tensor([[[huge], [-huge], [huge**0.6], [-(huge**0.6)]]], dtype=dtype, device=device).requires_grad_()
    one = torch.ones(1, 1, 1, dtype=dtype, device=device)
    y = grouped_mlp(x, one, None, one, None, act)
    y.sum().backward()
    assert torch.equal(y, x.clamp(min=0))
    assert x.grad.flatten().tolist() == [1, 0, 1, 0]


@each_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference(device, dtype, shape, bias):
    # A matmul in 16 bits also rounds the hidden layer: two more roundings, of short sums.
    slack = 8 if dtype in (torch.bfloat16, torch.float16) else 2
    if not served(device, dtype):
        return
    inputs = arguments(*shape, bias=bias)
    if dtype in (torch.bfloat16, torch.float16):
        result = grouped_mlp(*(None if a is None else a.to(device, dtype) for a in inputs))
        wanted = reference.grouped_mlp(*(None if a is None else a.to(dtype).double() for a in inputs))
        assert result.dtype == dtype
        torch.testing.assert_close(
            result.double().cpu(),
            wanted,
            rtol=0,
            atol=slack * torch.finfo(dtype).eps * wanted.abs().max().item(),
        )
    else:
        check_reference(
            grouped_mlp,
            reference.grouped_mlp,
            inputs,
            dtype,
            device,
            slack=slack,
            gradient_slack=slack,
        )


@pytest.mark.parametrize("bias", [True, False])
def test_is_an_mlp_per_expert(device, bias):
    x, w1, b1, w2, b2 = (None if a is None else a.to(device) for a in arguments(3, 5, 4, 7, 6, bias=bias))
    out = grouped_mlp(x, w1, b1, w2, b2)
    assert out.shape == (3, 5, 6)
    for e in range(3):
        hidden = nn.functional.linear(x[e], w1[e].t(), None if b1 is None else b1[e])
        wanted = nn.functional.linear(nn.GELU("tanh")(hidden), w2[e].t(), None if b2 is None else b2[e])
        assert_close(out[e], wanted)


@each_dtype
def test_exact_gelu(device, dtype):
    if not served(device, dtype):
        return
    slack = 8 if dtype in (torch.bfloat16, torch.float16) else 2
    inputs = [None if a is None else a.to(device, dtype) for a in arguments(3, 21, 4, 19, 6)]
    wanted = reference.grouped_mlp(*(a.cpu().double() for a in inputs), F.gelu)
    out = grouped_mlp(*inputs, "gelu").double().cpu()
    torch.testing.assert_close(out, wanted, rtol=0, atol=slack * torch.finfo(dtype).eps * wanted.abs().max().item())


@each_act
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("filled", [None, [[2, 0], [1, 3]]])
def test_gradient(device, bias, act, filled):
    inputs = arguments(2, 6, 2, 3, 2, bias=bias)
    filled = None if filled is None else torch.tensor(filled, dtype=torch.int32)
    check_gradient(grouped_mlp, [*inputs, act, filled], device)


@pytest.mark.parametrize("frozen", [(0,), (1, 2, 3, 4), (0, 1, 3), (2, 4)])
def test_gradient_of_some_arguments(device, frozen):
    inputs = [a.to(device).requires_grad_(i not in frozen) for i, a in enumerate(arguments(3, 5, 4, 7, 6))]
    leaves = [a for a in inputs if a.requires_grad]
    products = by_products(*inputs, None, GELU["gelu_tanh"])
    wanted = torch.autograd.grad(products, leaves, torch.ones_like(products))
    out = grouped_mlp(*inputs)
    for gradient, other in zip(torch.autograd.grad(out, leaves, torch.ones_like(out)), wanted, strict=True):
        assert_close(gradient, other)


def test_second_derivative_is_refused(device):
    inputs = [a.to(device).requires_grad_() for a in arguments(2, 3, 2, 3, 2)]
    (grad,) = torch.autograd.grad(grouped_mlp(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="grouped_mlp_backward has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("bias", [True, False])
def test_compile(device, bias):
    check_compile(grouped_mlp, arguments(2, 3, 2, 3, 2, bias=bias), device)


def test_compile_ragged(device):
    filled = torch.tensor([[1, 3], [0, 2]], dtype=torch.int32, device=device)
    check_compile(grouped_mlp, [*arguments(2, 6, 2, 3, 2), "gelu", filled], device)


@each_act
@pytest.mark.parametrize("bias", [True, False])
def test_dispatcher(device, act, bias):
    op = torch.ops.vmoe_routers.grouped_mlp.default
    inputs = [None if a is None else a.to(device).requires_grad_() for a in arguments(2, 6, 2, 3, 2, bias=bias)]
    everything = torch.full((2, 2), 3, dtype=torch.int32, device=device)
    check_dispatcher(op, [*inputs, None, act, True])
    check_dispatcher(op, [*inputs, everything, act, True])  # rows that are not filled are not written
    some = torch.tensor([[1, 3], [0, 2]], dtype=torch.int32, device=device)
    check_dispatcher(op, [*inputs, some, act, False])


@pytest.mark.parametrize(("of_x", "of_weights"), [(True, False), (False, True)])
def test_fake_kernel_of_some_gradients(device, of_x, of_weights):
    x, w1, b1, w2, _ = (a.to(device) for a in arguments(2, 6, 2, 3, 4))
    arguments_of_backward = (x.new_ones(2, 6, 4), x, w1, b1, w2, None, x.new_empty(2, 0, 3), "gelu", of_x, of_weights)
    op = torch.ops.vmoe_routers.grouped_mlp_backward.default
    torch.library.opcheck(op, arguments_of_backward, test_utils=("test_schema", "test_faketensor"))


RAGGED = [
    # G, C, counts [E, G]; over a block of rows and in many pieces
    (1, 12, [[12], [0], [7]]),
    (3, 4, [[4, 4, 4], [0, 3, 0], [1, 0, 4]]),
    (5, 80, [[80, 80, 80, 80, 80], [80, 0, 61, 80, 3], [0, 0, 0, 0, 0]]),
    (2, 900, [[900, 900], [850, 17], [2, 899]]),
]


@each_act
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "slots", "counts"), RAGGED)
def test_filled_rows_equal_the_padded_form(device, groups, slots, counts, dtype, act):
    if not served(device, dtype):
        return
    filled = torch.tensor(counts, dtype=torch.int32, device=device)
    inputs = [a.to(device, dtype).requires_grad_() for a in arguments(3, groups * slots, 4, 9, 6)]
    there = (torch.arange(slots, device=device) < filled[..., None]).flatten(1).unsqueeze(2)
    out = grouped_mlp(*inputs, act, filled)
    padded = by_products(*inputs, None, GELU[act])
    tolerance = {"rtol": 0, "atol": 64 * torch.finfo(dtype).eps}
    torch.testing.assert_close(out, padded.masked_fill(~there, 0), **tolerance)

    cotangent = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, cotangent)
    wanted = torch.autograd.grad(padded, inputs, cotangent * there)
    assert gradients[0].masked_fill(there, 0).count_nonzero() == 0
    for gradient, other in zip(gradients, wanted, strict=True):
        size = max(1.0, other.abs().max().item())
        torch.testing.assert_close(gradient / size, other / size, **tolerance)


def test_the_gradient_of_rows_that_are_not_filled_is_ignored(device):
    inputs = [a.to(device).requires_grad_() for a in arguments(2, 6, 4, 7, 4)]
    out = grouped_mlp(*inputs, filled=torch.tensor([[1, 2], [3, 0]], dtype=torch.int32, device=device))
    there = out.detach().abs().sum(2, keepdim=True) > 0
    cotangent = torch.randn_like(out)
    wanted = torch.autograd.grad(out, inputs, cotangent.masked_fill(~there, 0), retain_graph=True)
    for gradient, other in zip(
        torch.autograd.grad(out, inputs, cotangent.masked_fill(~there, NAN)), wanted, strict=True
    ):
        assert torch.equal(gradient, other)


@pytest.mark.cpu_kernels
def test_rows_that_are_not_filled_are_not_read():
    inputs = [a.requires_grad_() for a in arguments(2, 6, 4, 7, 4)]
    filled = torch.tensor([[1, 2], [3, 0]], dtype=torch.int32)
    wanted = grouped_mlp(*inputs, filled=filled)
    there = wanted.detach().abs().sum(2) > 0
    with torch.no_grad():
        inputs[0][~there] = NAN
    out = grouped_mlp(*inputs, filled=filled)
    assert torch.equal(out, wanted)
    assert not any(g.isnan().any() for g in torch.autograd.grad(out, inputs, torch.full_like(out, 1.0)))


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("experts", [1, 2, 40])
def test_threads_change_nothing_but_rounding(experts):
    inputs = [a.requires_grad_() for a in arguments(experts, 300, 8, 900, 8)]

    def run():
        out = grouped_mlp(*inputs)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    results = with_threads(run)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("experts", [1, 2, 40])
def test_repeats_bit_by_bit(device, experts):
    inputs = [a.to(device).requires_grad_() for a in arguments(experts, 300, 8, 900, 8)]

    def results():
        out = grouped_mlp(*inputs)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    results()  # torch's product may round differently in the call that starts its threads
    wanted = results()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))


def test_without_saved_products_the_gradient_recomputes_them(device):
    x, w1, b1, w2, b2 = (a.to(device) for a in arguments(3, 5, 4, 7, 6))
    op, backward = torch.ops.vmoe_routers.grouped_mlp, torch.ops.vmoe_routers.grouped_mlp_backward
    gradients = []
    for save in (True, False):
        out, hidden = op(x, w1, b1, w2, b2, None, "gelu", save)
        assert hidden.shape == (3, 5 if save else 0, 7)
        gradients.append(backward(torch.ones_like(out), x, w1, b1, w2, None, hidden, "gelu", True, True))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b)


def test_keeps_hidden_values_only_for_a_backward_pass(device):
    inputs = [a.to(device) for a in arguments(3, 5, 4, 7, 6)]
    kept = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.vmoe_routers.grouped_mlp.default:
                kept.append(result[1].shape[1])
            return result

    with Calls():
        grouped_mlp(*inputs)
        inputs[2].requires_grad_()
        with torch.no_grad():
            grouped_mlp(*inputs)
        grouped_mlp(*inputs)
    assert kept == [0, 0, 5]


def test_saves_one_hidden_product(device):
    inputs = [a.to(device).requires_grad_() for a in arguments(3, 50, 4, 16, 4)]
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        grouped_mlp(*inputs)
    own = {a.data_ptr() for a in inputs}
    assert [t.shape for pointer, t in saved.items() if pointer not in own] == [(3, 50, 16)]
    with torch.no_grad():
        assert not grouped_mlp(*inputs).requires_grad


def test_export():
    class Module(nn.Module):
        def forward(self, *inputs):
            return grouped_mlp(*inputs)

    inputs = tuple(a.float() for a in arguments(2, 6, 2, 3, 2))
    program = torch.export.export(Module(), inputs)
    assert_close(program.module()(*inputs), grouped_mlp(*inputs))


@pytest.mark.parametrize("shape", [(0, 5, 4, 7, 4), (3, 0, 4, 7, 4), (3, 5, 4, 7, 0)])
def test_empty(device, shape):
    inputs = [a.to(device).requires_grad_() for a in arguments(*shape)]
    out = grouped_mlp(*inputs)
    assert out.shape == (shape[0], shape[1], shape[4])
    out.sum().backward()
    assert all(torch.equal(a.grad, torch.zeros_like(a)) for a in inputs[:3])


def test_without_hidden_columns(device):
    inputs = [a.to(device).requires_grad_() for a in arguments(3, 5, 4, 0, 6)]
    out = grouped_mlp(*inputs)
    assert torch.equal(out, inputs[4].unsqueeze(1).expand_as(out))
    out.sum().backward()
    assert torch.equal(inputs[0].grad, torch.zeros_like(inputs[0]))


def test_experts_do_not_affect_each_other(device):
    inputs = [a.to(device) for a in arguments(3, 5, 4, 7, 4)]
    wanted = grouped_mlp(*inputs)
    inputs[0][1, 2] = torch.tensor([NAN, INF, -INF, 1.0])
    out = grouped_mlp(*inputs)
    assert out[1, 2].isnan().all()
    out[1, 2] = wanted[1, 2]
    assert_close(out, wanted)


def test_not_contiguous(device):
    inputs = [a.to(device) for a in arguments(3, 5, 4, 7, 6)]
    assert_close(grouped_mlp(*(strided(a) for a in inputs)), grouped_mlp(*inputs))


def test_refuses():
    x, w1, b1, w2, b2 = arguments(3, 5, 4, 7, 6)
    for wrong in (x[0], x[:2], x[..., :3], x.long(), x.tolist(), x.to("meta")):
        with refused(OP, "x|w1"):
            grouped_mlp(wrong, w1, b1, w2, b2)
    for wrong in (w1[0], w1[:2], w1[:, :3], w1.float(), w1.to("meta")):
        with refused(OP, "w1"):
            grouped_mlp(x, wrong, b1, w2, b2)
    for wrong in (b1[0], b1[:, :6], b1[:, None], b1.float()):
        with refused(OP, "b1"):
            grouped_mlp(x, w1, wrong, w2, b2)
    for wrong in (w2[0], w2[:2], w2[:, :6], w2.float()):
        with refused(OP, "w2"):
            grouped_mlp(x, w1, b1, wrong, b2)
    for wrong in (b2[0], b2[:, :5], b2[:, None], b2.float()):
        with refused(OP, "b2"):
            grouped_mlp(x, w1, b1, w2, wrong)
    filled = torch.ones(3, 5, dtype=torch.int32)
    for wrong in (filled[0], filled[:2], filled[:, :2], filled[:, :0], filled.long(), filled.to("meta"), [[1]]):
        with refused(OP, "filled"):
            grouped_mlp(x, w1, b1, w2, b2, filled=wrong)
    with refused(OP, "act"):
        grouped_mlp(x, w1, b1, w2, b2, "relu")
    with refused(OP, "act"):
        grouped_mlp(x, w1, b1, w2, b2, F.gelu)
