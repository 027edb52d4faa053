"""Experts that have a gate, a norm inside, or a bias in one layer only."""

import copy
import math
from functools import partial

import pytest
import timm.layers
import torch
from torch import nn
from torch.nn import functional as F

import vmoe_routers as vr
from vmoe_routers.experts import Experts, GeluTanh

E, D, HIDDEN, OUT = 3, 5, 7, 4
GROUPS, SLOTS = 2, 6
FILLED = torch.tensor([[6, 0, 3], [2, 5, 1]], dtype=torch.int32)
SWIGLU = {"glu": True, "act_layer": nn.SiLU}
NORM = partial(nn.LayerNorm, eps=1e-3)


def made(dtype=torch.float64, **options):
    """Experts with biases and norms that differ from their initial values, and slots."""
    torch.manual_seed(0)
    experts = Experts(E, D, HIDDEN, OUT, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return experts, torch.randn(E, GROUPS, SLOTS, D, dtype=dtype, requires_grad=True)


def loop(experts, x, filled):
    """Computes the outputs expert by expert and slot by slot."""
    rows = []
    for e in range(E):
        groups = []
        for g in range(GROUPS):
            count = SLOTS if filled is None else int(filled[g, e])
            hidden = x[e, g, :count] @ experts.w1[e] + (0 if experts.b1 is None else experts.b1[e])
            gate, value = (hidden[:, :HIDDEN], hidden[:, HIDDEN:]) if experts.glu else (hidden, 1)
            hidden = experts.act(gate) * value
            if experts.norm is not None:
                weight, bias = (None if p is None else p[e] for p in (experts.norm.weight, experts.norm.bias))
                hidden = F.layer_norm(hidden, (HIDDEN,), weight, bias, experts.norm.eps)
            y = hidden @ experts.w2[e] + (0 if experts.b2 is None else experts.b2[e])
            groups.append(F.pad(y, (0, 0, 0, SLOTS - count)))
        rows.append(torch.stack(groups))
    return torch.stack(rows)


@pytest.mark.parametrize("filled", [None, FILLED], ids=["all", "filled"])
@pytest.mark.parametrize("bias", [True, False, (True, False), [False, True]], ids=str)
@pytest.mark.parametrize("norm_layer", [None, NORM, partial(NORM, bias=False), partial(NORM, elementwise_affine=False)])
@pytest.mark.parametrize("kind", [SWIGLU, {"glu": True}, {}, {"act_layer": nn.ReLU}], ids=str)
def test_against_a_loop(kind, norm_layer, bias, filled):
    experts, x = made(**kind, norm_layer=norm_layer, bias=bias)
    inputs = [x, *experts.parameters()]
    got, wanted = experts(x, filled), loop(experts, x, filled)
    torch.testing.assert_close(got, wanted)
    v = torch.randn_like(got)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, v) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)
    if filled is not None:
        assert not got[torch.arange(SLOTS) >= filled.t()[..., None]].any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("norm_layer", [None, NORM])
def test_gradcheck(norm_layer):
    experts, x = made(**SWIGLU, norm_layer=norm_layer)
    names = list(dict(experts.named_parameters()))

    def outputs(x, *parameters):
        return torch.func.functional_call(experts, dict(zip(names, parameters, strict=True)), (x, FILLED))

    inputs = (x, *experts.parameters())
    assert torch.autograd.gradcheck(outputs, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, inputs, fast_mode=True)


@pytest.mark.parametrize("gate_last", [False, True])
def test_is_timms(gate_last):
    """The packed weight is the weight of SwiGLUPacked. If the gate is last, its halves are exchanged."""
    mlp = timm.layers.GluMlp(D, 2 * HIDDEN, OUT, act_layer=nn.SiLU, gate_last=gate_last)
    experts = Experts(1, D, HIDDEN, OUT, **SWIGLU)
    order = (1, 0) if gate_last else (0, 1)
    with torch.no_grad():
        experts.w1[0] = torch.cat([mlp.fc1.weight.chunk(2)[i] for i in order]).T
        experts.b1[0] = torch.cat([mlp.fc1.bias.chunk(2)[i] for i in order])
        experts.w2[0], experts.b2[0] = mlp.fc2.weight.T, mlp.fc2.bias
    x = torch.randn(1, 2, 3, D)
    torch.testing.assert_close(experts(x), mlp(x))


def test_at_the_start():
    """The gate and the value are drawn as two matrices [D, F], not as one [D, 2F]."""
    experts = Experts(5, 40, 160, 30, **SWIGLU, norm_layer=nn.LayerNorm)
    assert experts.w1.shape == (5, 40, 320) and experts.b1.shape == (5, 320) and experts.w2.shape == (5, 160, 30)
    bound = math.sqrt(6 / 200)
    for half in experts.w1.chunk(2, dim=2):
        assert not torch.equal(half[0], half[1])
        for expert in half:
            assert 0.97 * bound < expert.abs().max() <= bound
    assert not torch.equal(*experts.w1.chunk(2, dim=2))
    same = Experts(5, 40, 160, 30, **SWIGLU, same_init=True)
    assert (same.w1 == same.w1[:1]).all() and (same.w2 == same.w2[:1]).all()
    assert same.w1.requires_grad and same.w1.is_leaf
    for parameter in experts.parameters():
        parameter.data.fill_(9)
    experts.reset_parameters()
    assert experts.w1.abs().max() <= bound and not experts.b1.any() and not experts.b2.any()
    assert (experts.norm.weight == 1).all() and not experts.norm.bias.any()
    assert "5 x (40 -> 160 -> 30, gated)" in repr(experts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_layer", [None, nn.LayerNorm])
def test_16_bits_and_autocast(dtype, norm_layer):
    experts, x = made(torch.float32, **SWIGLU, norm_layer=norm_layer)
    wanted = experts(x, FILLED)
    half = copy.deepcopy(experts).to(dtype)
    got = half(x.to(dtype), FILLED)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=0.05, rtol=0.05)
    with torch.autocast("cpu", dtype=dtype):
        got = experts(x, FILLED)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, atol=0.05, rtol=0.05)


def test_dropout():
    experts, x = made(**SWIGLU, drop=0.5)
    plain, _ = made(**SWIGLU)
    assert torch.equal(experts.eval()(x), plain(x))
    experts.train()
    torch.manual_seed(1)
    got = experts(x)
    torch.manual_seed(1)
    gate, value = torch.baddbmm(experts.b1.unsqueeze(1), x.flatten(1, 2), experts.w1).chunk(2, dim=-1)
    hidden = F.dropout(F.silu(gate) * value, 0.5)
    wanted = F.dropout(torch.baddbmm(experts.b2.unsqueeze(1), hidden, experts.w2), 0.5)
    torch.testing.assert_close(got, wanted.unflatten(1, (GROUPS, SLOTS)))


@pytest.mark.parametrize("router", ["softmax_token_choice", "sinkhorn_expert_choice", "soft"])
def test_in_a_layer(router):
    """Gated experts train, compile and load from a state dict."""
    torch._dynamo.reset()
    options = {"num_experts": 4, "router": router, **SWIGLU, "norm_layer": nn.LayerNorm}
    layer, x = vr.MoEMlp(6, 8, **options), torch.randn(2, 9, 6)
    layer(x).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in layer.experts.named_parameters())
    layer.eval()
    other = vr.MoEMlp(6, 8, **options).eval()
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))


def test_norm_layer_of_timms_block():
    from timm.models.vision_transformer import Block

    block = Block(12, 3, scale_mlp_norm=True, mlp_layer=partial(vr.MoEMlp, num_experts=4))
    norm = block.mlp.experts.norm
    assert norm.weight.shape == norm.bias.shape == (4, 48)
    assert block(torch.randn(2, 5, 12)).shape == (2, 5, 12)


@pytest.mark.parametrize(("options", "error", "words"), [
    ({"glu": 1}, TypeError, "Experts: glu must be a bool, got int"),
    ({"bias": (True, 1)}, TypeError, "Experts: bias must be a bool, got int"),
    ({"bias": (True, True, True)}, TypeError, "Experts: bias must be a bool, got tuple"),
    ({"norm_layer": lambda width, **_: nn.Identity()}, TypeError, "norm_layer must make an nn.LayerNorm, got Identity"),
])  # fmt: skip
def test_refuses(options, error, words):
    with pytest.raises(error, match=words):
        vr.MoEMlp(D, **options)


@pytest.mark.parametrize("act_layer", [nn.SiLU, GeluTanh])
@pytest.mark.parametrize("glu", [False, True])
def test_refuses_another_dtype(act_layer, glu):
    experts = Experts(E, D, HIDDEN, OUT, act_layer, glu=glu)
    with pytest.raises(TypeError, match=r"x must have the experts' dtype torch\.float32, got torch\.float64"):
        experts(torch.zeros(E, 1, 2, D, dtype=torch.float64))
