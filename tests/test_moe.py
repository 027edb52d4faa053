"""MoEMlp: against its formula, single and in batches, copied, compiled, exported, in place of timm's Mlp."""

import copy
import io
import math
import pickle
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import vmoe_routers as vr
from vmoe_routers.ops._dtypes import HALF_PRODUCTS

CASES = [
    ("softmax_token_choice", {"top_k": 1}),
    ("softmax_token_choice", {"top_k": 2, "batch_priority": True}),
    ("softmax_token_choice", {"top_k": 3, "capacity_factor": 0.4, "capacity_multiple_of": 1}),
    ("softmax_token_choice", {"top_k": 2, "renormalize": True}),
    ("sinkhorn_token_choice", {"top_k": 1, "combine": "plan"}),
    ("sinkhorn_token_choice", {"top_k": 2, "batch_priority": True}),
    ("sinkhorn_token_choice", {"top_k": 3, "combine": "plan", "capacity_factor": 0.5}),
    ("softmax_expert_choice", {}),
    ("softmax_expert_choice", {"capacity_factor": 0.3}),
    ("sinkhorn_expert_choice", {}),
    ("sinkhorn_expert_choice", {"combine": "plan", "capacity_factor": 2.0}),
    ("sparsity_constrained_expert_choice", {}),
    ("sparsity_constrained_expert_choice", {"combine": "plan"}),
    ("soft", {}),
    ("soft", {"slots_per_expert": 3, "scale_init": 4.0}),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Runs the tests on one thread: tensors are so small that threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def layer(router, group_size=1, *, features=(5, 7, 6), dtype=torch.float64, **options):
    made = vr.MoEMlp(*features, num_experts=4, router=router, group_size=group_size, dtype=dtype, **options)
    with torch.no_grad():  # otherwise the biases are 0
        made.experts.b1.normal_()
        made.experts.b2.normal_()
    return made


gelu_tanh = partial(F.gelu, approximate="tanh")


def einsum_form(layer, routing, x, act=gelu_tanh):
    """Computes the layer by einsum, with the dense tensors of the routing; x is [B, T, D]."""
    D, B = routing.dispatch_tensor(), routing.combine_tensor()
    groups = x.reshape(D.shape[0], D.shape[1], -1)
    slots = torch.einsum("gtec,gtd->gecd", D.to(x.dtype), groups)
    experts = layer.experts
    done = []
    for e in range(D.shape[2]):
        hidden = act(slots[:, e] @ experts.w1[e] + experts.b1[e])
        done.append(hidden @ experts.w2[e] + experts.b2[e])
    out = torch.einsum("gtec,gecd->gtd", B, torch.stack(done, 1))
    return out.reshape(*x.shape[:2], -1)


def recorded(model, *inputs):
    """The output, and the routings of all MoE layers in order."""
    with vr.inspect.record(model) as trace:
        out = model(*inputs)
    return out, [routing for routings in trace.routings.values() for routing in routings]


def gradients(out, inputs, v):
    return torch.autograd.grad((out * v).sum(), inputs, retain_graph=True)


# Against the formula


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("group_size", [1, 2, 4])
@pytest.mark.parametrize(("router", "options"), CASES)
def test_layer_is_the_einsum_form(router, options, group_size, training):
    moe = layer(router, group_size, **options).train(training)
    x = torch.randn(4, 6, 5).double().requires_grad_()
    out, (routing,) = recorded(moe, x)
    assert out.shape == (4, 6, 6)
    assert out.dtype == x.dtype
    assert (routing.num_groups, routing.num_tokens) == (4 // group_size, 6 * group_size)
    wanted = einsum_form(moe, routing, x)
    torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-12)
    v = torch.randn_like(out)
    inputs = [x, *moe.parameters()]
    for got, want in zip(gradients(out, inputs, v), gradients(wanted, inputs, v), strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-10)
    router_gradient = gradients(moe(x), list(moe.router.parameters()), v)
    assert all(gradient.abs().max() > 1e-6 for gradient in router_gradient)


GRADCHECK = [
    *((name, options) for name, options in CASES if not name.startswith("sparsity")),
    ("sparsity_constrained_expert_choice", {}),
    # No gradient flows through the potentials, so gradcheck needs constant potentials: 0 iterations.
    ("sparsity_constrained_expert_choice", {"combine": "plan", "iterations": 0}),
    ("sinkhorn_token_choice", {"combine": "plan", "gradient": "implicit", "iterations": 300}),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("router", "options"), GRADCHECK)
def test_gradcheck(router, options, training):
    moe = layer(router, 2, features=(3, 4, 2), **options).train(training)
    if router != "soft":
        torch.nn.init.orthogonal_(moe.router.weight, 3.0)  # logits far apart
    noise = {}
    moe.router.draw_noise = lambda logits: noise.setdefault("once", torch.randn_like(logits))
    x = torch.randn(2, 4, 3).double().requires_grad_()
    names, values = zip(*moe.named_parameters(), strict=True)

    def function(x, *values):
        return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))

    def auxiliary(x, *values):
        function(x, *values)
        return vr.aux_loss(moe)

    assert torch.autograd.gradcheck(function, (x, *values), fast_mode=True)
    if router == "softmax_token_choice":
        assert torch.autograd.gradcheck(auxiliary, (x, *values), fast_mode=True)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("router", "options"), CASES)
def test_a_second_derivative_is_refused(router, options):
    moe = layer(router, **options)
    x = torch.randn(2, 6, 5).double().requires_grad_()
    (gradient,) = torch.autograd.grad(moe(x).square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"derivative|differentiable"):
        gradient.square().sum().backward()


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("router", "options"), CASES)
def test_any_strides(router, options):
    moe = layer(router, 2, **options).eval()
    x = torch.randn(4, 6, 5).double()
    wanted = moe(x)
    for other in (
        torch.empty(4, 6, 10).double()[..., ::2].copy_(x),
        x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        x.flip(1).flip(1).transpose(0, 1).contiguous().transpose(0, 1),
    ):
        other = other.requires_grad_()
        out = moe(other)
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
        out.sum().backward()
        assert other.grad.isfinite().all()
    alike = x[:1, :1].expand(4, 6, 5)
    torch.testing.assert_close(moe(alike), moe(alike.contiguous()), atol=1e-12, rtol=0)


# Batches and groups


@pytest.mark.parametrize(("router", "options"), CASES)
def test_an_image_does_not_depend_on_its_batch(router, options):
    moe = layer(router, dtype=torch.float32, **options).eval()
    x = torch.randn(5, 6, 5)
    together = moe(x)
    for i in range(5):
        torch.testing.assert_close(moe(x[i : i + 1])[0], together[i], atol=1e-6, rtol=0)
    torch.testing.assert_close(moe(x.flip(0)).flip(0), together, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("router", "options"), CASES)
def test_a_bad_image_does_not_affect_other_images(router, options, bad):
    moe = layer(router, dtype=torch.float32, **options).eval()
    x = torch.randn(4, 6, 5)
    wanted = moe(x)
    x[2, 3, 1] = bad
    out = moe(x)
    others = [0, 1, 3]
    torch.testing.assert_close(out[others], wanted[others], atol=1e-6, rtol=0)


@pytest.mark.parametrize("router", ["softmax_expert_choice", "sinkhorn_expert_choice", "soft"])
def test_permuting_tokens_permutes_outputs(router):
    moe = layer(router).eval()
    x = torch.randn(3, 8, 5).double()
    order = torch.randperm(8)
    torch.testing.assert_close(moe(x[:, order]), moe(x)[:, order], atol=1e-10, rtol=0)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("router", "options"), CASES)
def test_in_eval_the_last_group_may_be_smaller(router, options):
    moe = layer(router, 3, **options).eval()
    x = torch.randn(8, 6, 5).double()
    out, routings = recorded(moe, x)
    assert [(r.num_groups, r.num_tokens) for r in routings] == [(2, 18), (1, 12)]
    torch.testing.assert_close(out[:6], moe(x[:6]), atol=1e-12, rtol=0)
    torch.testing.assert_close(out[6:], moe(x[6:]), atol=1e-12, rtol=0)
    out, routings = recorded(moe, x[:2])
    assert out.shape == (2, 6, 6)
    assert [(r.num_groups, r.num_tokens) for r in routings] == [(1, 12)]


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_in_training_the_last_group_may_not_be_smaller(router):
    moe = layer(router, 3)
    moe(torch.randn(3, 6, 5).double())
    random = torch.get_rng_state()
    before = copy.deepcopy(moe.state_dict())
    with pytest.raises(ValueError, match=r"MoEMlp: .*8 images.*group_size=3"):
        moe(torch.randn(8, 6, 5, generator=torch.Generator().manual_seed(0)).double())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[key]) for key, value in moe.state_dict().items())


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("router", "options"), CASES)
def test_small_batches(router, options, training, shape):
    moe = layer(router, 2, **options).train(training)
    x = torch.randn(*shape, 5).double().requires_grad_()
    out = moe(x)
    assert out.shape == (*shape, 6)
    (out.sum() + vr.aux_loss(moe)).backward()
    for name, value in (("x", x), *moe.named_parameters()):
        assert value.grad is not None, name
        assert value.grad.isfinite().all(), name


# Masks


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize(("router", "options"), CASES)
def test_padding(router, options, group_size):
    """The output of masked tokens is 0. At equal capacity, real tokens have the same outputs as without padding."""
    real, padded = 6, 9
    factor = options.get("capacity_factor", 1.0)
    more = {} if router == "soft" else {"capacity_factor": factor * real / padded}
    torch.manual_seed(1)
    alone = layer(router, group_size, **options).eval()
    torch.manual_seed(1)
    moe = layer(router, group_size, **{**options, **more}).eval()
    mask = torch.stack([torch.randperm(padded) < real for _ in range(4)])
    tokens = torch.randn(4, real, 5).double()
    x = torch.full((4, padded, 5), 9.0).double()
    x[mask] = tokens.flatten(0, 1)
    x.requires_grad_()
    (wanted, (routing,)), (out, (padded_routing,)) = recorded(alone, tokens), recorded(moe, x, mask)
    assert routing.capacity == padded_routing.capacity
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[mask], wanted.flatten(0, 1), atol=1e-12, rtol=0)
    torch.testing.assert_close(vr.aux_loss(moe), vr.aux_loss(alone))
    out.sum().backward()
    assert (x.grad[~mask] == 0).all()
    # Also where the last group is smaller.
    odd = moe(x.detach()[:3], mask[:3])
    assert (odd[~mask[:3]] == 0).all()
    if group_size == 1:
        torch.testing.assert_close(odd, out.detach()[:3], atol=1e-12, rtol=0)


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_tokens_may_have_several_axes(router):
    moe = layer(router, 2).eval()
    mask = torch.rand(2, 3, 4) < 0.7
    for x, its_mask in ((torch.randn(2, 3, 4, 5).double(), mask), (torch.randn(2, 3, 2, 2, 5).double(), None)):
        x = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        with vr.inspect.record(moe) as trace:
            y = moe(x, its_mask)
        rows = x.detach().reshape(2, 12, 5).requires_grad_()
        wanted = moe(rows, None if its_mask is None else its_mask.reshape(2, 12))
        assert torch.equal(y, wanted.view(*x.shape[:-1], 6))
        y.square().sum().backward()
        wanted.square().sum().backward()
        assert torch.equal(x.grad, rows.grad.view_as(x))
        assert trace.layers[0].num_images == 2
    assert moe(torch.zeros(2, 0, 4, 5).double()).shape == (2, 0, 4, 6)


@pytest.mark.parametrize(("router", "options"), CASES)
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
def test_values_of_padded_tokens_affect_nothing(router, options, poison):
    moe = layer(router, 2, **options).eval()
    mask = torch.rand(4, 9) > 0.3
    tokens = torch.randn(4, 9, 5).double()
    found = []
    for x in (tokens, tokens.masked_fill(~mask.unsqueeze(2), poison)):
        out = moe(x, mask)
        loss = out.square().sum() + vr.aux_loss(moe)
        found.append((out, *torch.autograd.grad(loss, list(moe.parameters()))))
    for clean, poisoned in zip(*found):
        assert torch.equal(clean, poisoned)


# Auxiliary loss


@pytest.mark.usefixtures("on_device")
def test_aux_loss_sums_the_layers():
    first = layer("softmax_token_choice", 2, features=(5, 7, 5))
    second = layer("sinkhorn_token_choice", 1, features=(5, 7, 5), z_loss_weight=0.5)
    third = layer("soft", features=(5, 7, 5))
    model = torch.nn.Sequential(first, torch.nn.Sequential(second, torch.nn.GELU()), third)
    assert vr.aux_loss(model) == 0, "before the first forward"
    _, routings = recorded(model, torch.randn(4, 6, 5).double())
    a, b = routings[0].losses, routings[1].losses
    wanted = 0.005 * (a["importance"] + a["load"]) + 0.5 * b["z"]
    torch.testing.assert_close(vr.aux_loss(model), wanted)
    assert vr.aux_loss(model).shape == ()
    vr.aux_loss(model).backward()
    assert first.router.weight.grad.abs().max() > 0
    assert second.router.weight.grad.abs().max() > 0
    kept = vr.aux_loss(model)
    model(torch.randn(4, 6, 5).double())
    assert vr.aux_loss(model) != kept, "the loss is of the last forward"


def test_aux_loss_of_a_smaller_last_group():
    """The loss is the mean over all groups: two groups of two images and a last group of one image."""
    moe = layer("softmax_token_choice", 2, importance_loss_weight=1.0).eval()
    x = torch.randn(5, 6, 5).double()
    moe(x)
    got = vr.aux_loss(moe)
    each = []
    for part in (x[:2], x[2:4], x[4:]):
        moe(part)
        each.append(vr.aux_loss(moe))
    torch.testing.assert_close(got, torch.stack(each).mean())


def test_aux_loss_without_layers():
    assert vr.aux_loss(torch.nn.Linear(2, 2)) == 0
    loss = vr.aux_loss(torch.nn.Sequential())
    assert loss.shape == ()


# Experts


def test_arguments():
    moe = vr.MoEMlp(6, num_experts=3)
    assert moe.experts.w1.shape == (3, 6, 6)
    assert moe.experts.w2.shape == (3, 6, 6)
    assert isinstance(moe.router, vr.SoftRouter)
    assert moe.group_size == 1
    assert moe.router.slots_per_expert == 1
    assert vr.MoEMlp(6).router.num_experts == 32
    assert vr.MoEMlp(6, 8, 9, num_experts=2)(torch.randn(2, 3, 6)).shape == (2, 3, 9)
    bare = vr.MoEMlp(6, 8, num_experts=2, bias=False)
    assert bare.experts.b1 is None
    assert bare.experts.b2 is None
    assert bare(torch.zeros(2, 3, 6)).abs().max() == 0
    relu = vr.MoEMlp(6, 8, 6, torch.nn.ReLU, num_experts=2, router="softmax_expert_choice").eval()
    x = torch.randn(2, 4, 6)
    out, (routing,) = recorded(relu, x)
    D, B = routing.dispatch_tensor(), routing.combine_tensor()
    hidden = (torch.einsum("gtec,gtd,edf->gecf", D, x, relu.experts.w1)).relu()
    torch.testing.assert_close(out, torch.einsum("gtec,gecf,efd->gtd", B, hidden, relu.experts.w2))


def test_experts_at_the_start():
    experts = vr.Experts(5, 40, 160, 30)
    bounds = {"w1": math.sqrt(6 / 200), "w2": math.sqrt(6 / 190)}
    for name, bound in bounds.items():
        weight = getattr(experts, name)
        for e in range(5):  # Xavier uniform of every expert by itself
            assert 0.97 * bound < weight[e].abs().max() <= bound
            assert abs(weight[e].std() / bound * math.sqrt(3) - 1) < 0.05
        assert not torch.equal(weight[0], weight[1]), "each from its own draw"
    assert experts.b1.abs().max() == experts.b2.abs().max() == 0
    same = vr.Experts(5, 40, 160, 30, same_init=True)
    for weight in (same.w1, same.w2):
        assert (weight == weight[:1]).all()
        assert weight.requires_grad
        assert weight.is_leaf


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("act_layer", [vr.experts.GeluTanh, torch.nn.GELU, torch.nn.ReLU])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_experts_compute_the_filled_slots(act_layer, drop):
    experts = vr.Experts(2, 4, 7, 5, act_layer, drop).eval()
    with torch.no_grad():
        experts.b2.normal_()
    x = torch.randn(2, 3, 6, 4)
    filled = torch.tensor([[6, 0], [2, 3], [1, 5]], dtype=torch.int32)
    kept = torch.arange(6) < filled.t()[..., None]
    whole = experts(x)
    assert whole.shape == (2, 3, 6, 5)
    torch.testing.assert_close(experts(x, filled), whole * kept[..., None])


def test_dropout_is_off_in_eval():
    moe = vr.MoEMlp(6, 32, num_experts=2, drop=0.5)
    x = torch.randn(2, 5, 6)
    assert not torch.equal(moe(x), moe(x))
    assert torch.equal(moe.eval()(x), moe(x))
    plain = vr.MoEMlp(6, 32, num_experts=2).eval()
    plain.load_state_dict(moe.state_dict())
    assert torch.equal(plain(x), moe(x))


# Copies, dtypes, compilers


@pytest.mark.parametrize(("router", "options"), CASES)
def test_copies(router, options):
    moe = layer(router, 2, **options)
    x = torch.randn(4, 6, 5).double()
    (moe(x).sum() + vr.aux_loss(moe)).backward()  # the layer then refers to a graph
    torch.manual_seed(5)
    wanted = moe(x)
    saved = io.BytesIO()
    torch.save(moe.state_dict(), saved)
    saved.seek(0)
    loaded = layer(router, 2, **options)
    assert not loaded.load_state_dict(torch.load(saved)).missing_keys
    for twin in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), loaded):
        torch.manual_seed(5)
        assert torch.equal(twin(x), wanted)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
    torch.manual_seed(5)
    assert torch.equal(moe(x), wanted), "the copies share nothing"


def test_state_dict_has_no_more_than_the_parameters():
    moe = layer("softmax_token_choice", 2)
    moe(torch.randn(4, 6, 5).double())
    names = ["router.logits.weight", "experts.w1", "experts.b1", "experts.w2", "experts.b2"]
    assert sorted(moe.state_dict()) == sorted(names)
    moe = layer("soft")
    assert sorted(moe.state_dict()) == sorted(["router.logits.phi", "router.logits.scale", *names[1:]])


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(("router", "options"), CASES)
def test_bfloat16(router, options):
    moe = layer(router, 2, dtype=torch.float32, **options).eval().to(torch.bfloat16)
    wide = copy.deepcopy(moe).float()
    x = torch.randn(4, 6, 5).bfloat16().requires_grad_()
    out, (routing,) = recorded(moe, x)
    assert out.dtype == torch.bfloat16
    wanted, (wide_routing,) = recorded(wide, x.float())
    routed, widely = routing.dispatch_tensor(), wide_routing.dispatch_tensor()
    if x.device.type in HALF_PRODUCTS and router == "soft":  # Phi is split into two parts of 16 bits
        torch.testing.assert_close(routed, widely, rtol=1e-4, atol=1e-6)
    else:
        assert torch.equal(routed, widely), "routing is in float32"
    torch.testing.assert_close(out.float(), wanted, atol=0.06, rtol=0.03)
    out.sum().backward()
    assert x.grad.dtype == torch.bfloat16
    for parameter in moe.parameters():
        assert parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("router", "options"), CASES)
def test_autocast(router, options, training):
    moe = layer(router, 2, dtype=torch.float32, **options).train(training)
    x = torch.randn(4, 6, 5).requires_grad_()
    torch.manual_seed(5)
    wanted, (routing,) = recorded(moe, x)
    D = routing.dispatch_tensor()
    for value in (x, x.bfloat16()):
        torch.manual_seed(5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, (routing,) = recorded(moe, value)
        assert routing.combine_tensor().dtype == torch.float32
        if value is x:
            assert torch.equal(routing.dispatch_tensor(), D)
            torch.testing.assert_close(out.float(), wanted, atol=0.06, rtol=0.03)
        (out.float().sum() + vr.aux_loss(moe)).backward()
        for parameter in moe.parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()


@pytest.mark.usefixtures("on_device")
def test_inference_mode():
    for router in vr.ROUTERS:
        moe = layer(router).eval()
        x = torch.randn(2, 6, 5).double()
        wanted = moe(x)
        with torch.inference_mode():
            out, (routing,) = recorded(moe, x)
            torch.testing.assert_close(out, wanted)
            assert routing.metrics["load"].shape == (2, 4)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("router", vr.ROUTERS)
def test_activation_checkpointing(router):
    moe = layer(router, 2)
    x = torch.randn(4, 6, 5).double().requires_grad_()
    results = []
    for function in (moe, partial(torch.utils.checkpoint.checkpoint, moe, use_reentrant=False)):
        torch.manual_seed(5)
        results.append(gradients(function(x), [x, *moe.parameters()], 1.0))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", vr.ROUTERS)
def test_compile(router, training):
    torch._dynamo.reset()
    moe = layer(router, 2, features=(8, 16, 8), dtype=torch.float32).train(training)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6, 8).requires_grad_()
    inputs = [x, *moe.parameters()]
    results = []
    for function in (moe, compiled):
        torch.manual_seed(5)
        out = function(x)
        loss = out.square().sum() + vr.aux_loss(moe)
        results.append([out, loss - out.square().sum(), *gradients(loss, inputs, 1.0)])
    for got, want in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("router", ["softmax_token_choice", "soft"])
def test_compile_of_a_training_step(router):
    """The compiled step contains the auxiliary loss and a mask."""
    torch._dynamo.reset()
    moe = layer(router, dtype=torch.float32)
    x = torch.randn(2, 6, 5)
    mask = torch.rand(2, 6) > 0.3

    def step(x, mask):
        return moe(x, mask).square().sum() + vr.aux_loss(moe)

    torch.manual_seed(5)
    wanted = gradients(step(x, mask), list(moe.parameters()), 1.0)
    torch.manual_seed(5)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(x, mask)
    for got, want in zip(gradients(loss, list(moe.parameters()), 1.0), wanted, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("router", vr.ROUTERS)
def test_export(router):
    moe = layer(router, dtype=torch.float32).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(moe, (torch.randn(4, 6, 5),), dynamic_shapes={"x": {0: batch}})
    for size in (1, 4, 7):
        x = torch.randn(size, 6, 5)
        torch.testing.assert_close(program.module()(x), moe(x), atol=1e-6, rtol=0)


# In timm's place


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_in_place_of_timms_mlp(router):
    from timm.models.vision_transformer import Block

    mlp = partial(vr.MoEMlp, num_experts=4, router=router, group_size=2)
    block = Block(12, num_heads=3, mlp_ratio=2.0, qkv_bias=True, proj_drop=0.1, mlp_layer=mlp)
    assert isinstance(block.mlp, vr.MoEMlp)
    assert block.mlp.experts.w1.shape == (4, 12, 24)
    assert block.mlp.experts.drop.p == 0.1
    x = torch.randn(4, 9, 12).requires_grad_()
    out = block(x)
    assert out.shape == x.shape
    (out.sum() + vr.aux_loss(block)).backward()
    for parameter in block.mlp.parameters():
        assert parameter.grad.isfinite().all()
    block.eval()
    inner = []
    block.mlp.register_forward_hook(lambda module, args, out: inner.append((args[0], out)))
    _, (routing,) = recorded(block, x)
    ((tokens, mixed),) = inner
    # timm's blocks pass their own activation, GELU in its exact form.
    wanted = einsum_form(block.mlp, routing, tokens, F.gelu)
    torch.testing.assert_close(mixed, wanted)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0,), {}, ValueError, "in_features.*>= 1.* 0"),
        ((8.0,), {}, TypeError, "in_features.*int.*float"),
        ((8, 0), {}, ValueError, "hidden_features.*>= 1.* 0"),
        ((8, 16, "8"), {}, TypeError, "out_features.*int.*str"),
        ((8,), {"num_experts": 0}, ValueError, "num_experts.*>= 1.* 0"),
        ((8,), {"num_experts": 2.0}, TypeError, "num_experts.*int.*float"),
        ((8,), {"group_size": 0}, ValueError, "group_size.*>= 1.* 0"),
        ((8,), {"group_size": None}, TypeError, "group_size.*int.*NoneType"),
        ((8,), {"router": "hash"}, ValueError, "'softmax_token_choice'.*'soft'.*'hash'"),
        ((8,), {"router": "soft", "top_k": 2}, TypeError, "'soft'.*'top_k'.*slots_per_expert"),
        ((8,), {"routr": "soft"}, TypeError, "'routr'"),
        (
            (8,),
            {"router": "softmax_token_choice", "num_experts": 4, "top_k": 5},
            ValueError,
            r"top_k.*\[1, 4\].* 5",
        ),
        ((8,), {"router": "softmax_token_choice", "top_k": 0}, ValueError, r"top_k.* 0"),
        (
            (8,),
            {"router": "softmax_expert_choice", "capacity_factor": 0.0},
            ValueError,
            "capacity_factor.*> 0.* 0",
        ),
        ((8,), {"drop": 1.5}, ValueError, r"MoEMlp: drop.*\[0, 1\].* 1.5"),
        ((8,), {"norm_layer": lambda width, **_: torch.nn.Identity()}, TypeError, "norm_layer.*LayerNorm.*Identity"),
    ],
)
def test_constructor_refuses(arguments, options, error, words):
    with pytest.raises(error, match=words):
        vr.MoEMlp(*arguments, **options)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0, 8, 8, 8), {}, ValueError, "num_experts.*>= 1.* 0"),
        ((4, 8, 8, 8.0), {}, TypeError, "out_features.*int.*float"),
        ((4, 8, 8, 8, None), {}, TypeError, "act_layer.*None"),
        ((4, 8, 8, 8), {"drop": -0.1}, ValueError, "drop.*>= 0.* -0.1"),
        ((4, 8, 8, 8), {"drop": 2.0}, ValueError, r"drop.*\[0, 1\].* 2.0"),
        ((4, 8, 8, 8), {"bias": "no"}, TypeError, "bias.*bool.*str"),
    ],
)
def test_experts_refuse(arguments, options, error, words):
    with pytest.raises(error, match=f"^Experts: {words}"):
        vr.Experts(*arguments, **options)


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (torch.zeros(2, 3, 8), ValueError, r"x.*\[E, G, C, D\].*\[2, 3, 8\]"),
        (torch.zeros(3, 2, 5, 8), ValueError, r"x.*\[4, 2, 5, 8\].*\[3, 2, 5, 8\]"),
        (torch.zeros(4, 2, 5, 7), ValueError, r"x.*\[4, 2, 5, 8\].*\[4, 2, 5, 7\]"),
        (torch.zeros(4, 2, 5, 8).long(), TypeError, "x.*float.*int64"),
        ([1.0], TypeError, "x.*Tensor.*list"),
    ],
    ids=range(5),
)
def test_experts_refuse_slots(x, error, words):
    with pytest.raises(error, match=f"^Experts: {words}"):
        vr.Experts(4, 8, 16, 8)(x)


def test_aux_loss_refuses():
    with pytest.raises(TypeError, match=r"^aux_loss: model.*Module.*Tensor"):
        vr.aux_loss(torch.zeros(3))


@pytest.mark.parametrize(
    ("x", "mask", "error", "words"),
    [
        (torch.zeros(6, 5), None, ValueError, r"x.*3 axes.*\[6, 5\]"),
        (torch.zeros(4, 6, 7), None, ValueError, r"x.*5.*, 7\]"),
        (torch.zeros(4, 6, 5).int(), None, TypeError, "x.*float.*int32"),
        (torch.zeros(4, 6, 5).bfloat16(), None, TypeError, "x.*bfloat16|bfloat16.*x"),
        (torch.zeros(4, 6, 5, device="meta"), None, ValueError, "x.*meta.*cpu"),
        (None, None, TypeError, "x.*Tensor.*NoneType"),
        (torch.zeros(4, 6, 5), torch.ones(5, 6).bool(), ValueError, r"mask.*\[4, 6\].*\[5, 6\]"),
        (torch.zeros(4, 6, 5), torch.ones(6, 4).bool(), ValueError, r"mask.*\[4, 6\].*\[6, 4\]"),
        (torch.zeros(4, 6, 5), torch.ones(4, 5).bool(), ValueError, r"mask.*\[4, 6\].*\[4, 5\]"),
        (torch.zeros(4, 6, 5), torch.ones(4, 6, 1).bool(), ValueError, r"mask.*\[4, 6, 1\]"),
        (torch.zeros(4, 6, 5), torch.ones(4, 6), TypeError, "mask.*bool.*float32"),
        (torch.zeros(4, 2, 3, 5), torch.ones(4, 6).bool(), ValueError, r"mask.*\[4, 2, 3\].*\[4, 6\]"),
        (torch.zeros(4, 2, 3, 7), None, ValueError, r"x.*in_features=5.*\[4, 2, 3, 7\]"),
        (torch.zeros(4, 6, 5), [True], TypeError, "mask.*Tensor.*list"),
        (
            torch.zeros(4, 6, 5),
            torch.ones(4, 6, device="meta").bool(),
            ValueError,
            "mask.*meta.*cpu",
        ),
    ],
    ids=range(15),
)
@pytest.mark.parametrize("router", ["softmax_token_choice", "softmax_expert_choice", "soft"])
def test_forward_refuses(router, x, mask, error, words):
    moe = layer(router, 2, dtype=torch.float32)
    before = copy.deepcopy(moe.state_dict())
    with pytest.raises(error, match=words):
        moe(x, mask)
    assert all(torch.equal(value, before[key]) for key, value in moe.state_dict().items())


def test_router_made_before():
    router = vr.TokenChoiceRouter(6, 4, affinity=vr.affinity.SparsityConstrained(), top_k=2)
    layer = vr.MoEMlp(6, num_experts=4, router=router)
    assert layer.router is router
    assert layer(torch.rand(2, 5, 6)).shape == (2, 5, 6)
    with pytest.raises(TypeError, match="top_k must be given to the router"):
        vr.MoEMlp(6, num_experts=4, router=router, top_k=1)
    with pytest.raises(ValueError, match="router must have dim 6 and num_experts 8, got 6 and 4"):
        vr.MoEMlp(6, num_experts=8, router=router)
    with pytest.raises(ValueError, match="router must have dim 6 and num_experts 4, got None and None"):
        vr.MoEMlp(6, num_experts=4, router=torch.nn.Linear(6, 4))
    with pytest.raises(TypeError, match="router must be a name, a router, or a function"):
        vr.MoEMlp(6, num_experts=4, router=4)


# NaN


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("router", "options"), CASES)
def test_a_nan_that_is_not_masked_stays_in_its_group(router, options, training):
    moe = layer(router, 2, **options).train(training)
    x = torch.randn(4, 6, 5).double()
    x[0, 3, 2] = math.nan
    out = moe(x)
    assert out[:2].isnan().any(), "the group with the NaN"
    assert out[2:].isfinite().all(), "the group without a NaN"
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[0, 3] = False
    assert moe(x, mask).isfinite().all()


# Experts and routers of one's own


def test_own_experts():
    x = torch.randn(2, 6, 5)
    moe = vr.MoEMlp(5, 7, num_experts=3, router="softmax_expert_choice").eval()
    mlps = []
    for e in range(3):
        mlp = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.GELU("tanh"), torch.nn.Linear(7, 5))
        with torch.no_grad():
            mlp[0].weight.copy_(moe.experts.w1[e].t())
            mlp[0].bias.copy_(moe.experts.b1[e])
            mlp[2].weight.copy_(moe.experts.w2[e].t())
            mlp[2].bias.copy_(moe.experts.b2[e])
        mlps.append(mlp)
    own = vr.MoEMlp(5, num_experts=3, router=moe.router, experts=mlps).eval()
    assert isinstance(own.experts, vr.ExpertList)
    torch.testing.assert_close(own(x), moe(x))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"experts": [torch.nn.Linear(5, 5)]}, ValueError, "experts must have num_experts 3, got 1"),
        ({"experts": []}, ValueError, "experts must be at least one module"),
        ({"experts": [torch.nn.Linear(5, 5), 3, 4]}, TypeError, "experts must be nn.Modules, got int"),
        ({"experts": torch.nn.Linear(5, 5)}, ValueError, "experts must have num_experts 3, got None"),
        ({"experts": 3}, TypeError, "experts must be a module or a sequence of modules, got int"),
        ({"router": lambda dim, num_experts: 3}, TypeError, "router must make an nn.Module, got int"),
        ({"router": lambda dim, num_experts: torch.nn.Identity()}, ValueError, "router must have dim 5"),
        (
            {"router": lambda dim: 3},
            TypeError,
            r"router must be a function \(dim, num_experts\) .* got <lambda>\(dim\)",
        ),
        *(
            ({"experts": [torch.nn.Identity()] * 3, name: value}, TypeError, f"{name} must not be given with experts")
            for name, value in [
                ("hidden_features", 7),
                ("out_features", 5),
                ("act_layer", torch.nn.ReLU),
                ("drop", 0.1),
                ("bias", False),
                ("same_init", True),
                ("glu", True),
                ("norm_layer", torch.nn.LayerNorm),
            ]
        ),
    ],
)
def test_own_parts_refused(arguments, error, words):
    with pytest.raises(error, match=words):
        vr.MoEMlp(5, num_experts=3, **arguments)


def test_a_made_router_is_on_the_device_and_in_the_dtype_of_the_layer():
    class Router(torch.nn.Linear):
        def __init__(self, dim, num_experts):
            super().__init__(dim, num_experts)
            self.dim, self.num_experts = dim, num_experts

    layer = vr.MoEMlp(5, num_experts=3, router=Router, device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.float64)}


def test_copies_made_within_record_record_nothing():
    moe = vr.MoEMlp(5, num_experts=3, router="soft")
    x = torch.randn(2, 6, 5)
    with vr.inspect.record(moe) as trace:
        for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
            assert torch.equal(copied(x), moe(x))
        assert len(trace.routings[""]) == 2
    moe(x)
    assert len(trace.routings[""]) == 2


def test_a_router_that_returns_no_routing():
    class Router(torch.nn.Identity):
        dim, num_experts = 5, 3

        def forward(self, x, mask=None):
            return x

    with pytest.raises(TypeError, match="router must return a Routing, got Tensor"):
        vr.MoEMlp(5, num_experts=3, router=Router())(torch.randn(2, 6, 5))


class DenseRouting(vr.Routing):
    """A routing with only the four abstract methods, in which every expert sees every token."""

    def __init__(self, x, num_experts):
        self.num_groups, self.num_tokens, _ = x.shape
        self.num_experts, self.capacity = num_experts, x.shape[1]

    def dispatch_tensor(self):
        one = torch.eye(self.num_tokens).expand(self.num_groups, self.num_experts, -1, -1)
        return one.transpose(1, 2)

    def combine_tensor(self):
        return self.dispatch_tensor() / self.num_experts

    def dispatch(self, x):
        return x.expand(self.num_experts, -1, -1, -1)

    def combine(self, y):
        return y.mean(0)


def test_a_routing_of_four_methods_has_metrics():
    class Router(torch.nn.Identity):
        dim, num_experts = 5, 3

        def forward(self, x, mask=None):
            return DenseRouting(x, self.num_experts)

    moe = vr.MoEMlp(5, num_experts=3, router=Router())
    x = torch.randn(2, 6, 5)
    out, (routing,) = recorded(moe, x)
    torch.testing.assert_close(out, einsum_form(moe, routing, x))
    metrics = routing.metrics
    assert torch.equal(metrics["load"], torch.full((2, 3), 6.0))
    assert metrics["utilisation"] == 1
    assert metrics["dropped"] == metrics["dead_experts"] == metrics["load_cv"] == 0
    assert metrics["entropy"].item() == pytest.approx(math.log(3))
    assert routing.losses == {}
    assert routing.aux_loss == vr.aux_loss(moe) == 0


@pytest.mark.parametrize(
    ("expert", "error", "words"),
    [
        (lambda x: x[:-1], ValueError, r"the output of expert 0 must be \[N, D\] = \[6, 5\], got \[5, 5\]"),
        (lambda x: None, TypeError, "the output of expert 0 must be a Tensor, got NoneType"),
    ],
)
def test_own_experts_keep_their_rows(expert, error, words):
    class Expert(torch.nn.Module):
        def forward(self, x):
            return expert(x)

    moe = vr.MoEMlp(5, num_experts=3, router="soft", experts=[Expert() for _ in range(3)], group_size=1)
    with pytest.raises(error, match=f"ExpertList: {words}"):
        moe(torch.randn(6, 4, 5))


def test_own_experts_of_another_number_than_the_routing():
    experts = vr.MoEMlp(5, num_experts=3, router="soft", experts=[torch.nn.Identity()] * 3).experts
    with pytest.raises(ValueError, match=r"ExpertList: x must be \[E, G, C, D\] = \[3, 1, 2, 5\], got \[2, 1, 2, 5\]"):
        experts(torch.randn(2, 1, 2, 5))


def test_a_routing_that_mixes_groups_and_tokens():
    class Transposed(vr.Routing):
        num_groups, num_tokens, num_experts, capacity = 2, 4, 3, 4

        def dispatch(self, x):
            return x.expand(3, -1, -1, -1).contiguous()

        def combine(self, y):
            return y.mean(0).transpose(0, 1)

        def dispatch_tensor(self): ...

        def combine_tensor(self): ...

    class Router(torch.nn.Identity):
        dim, num_experts = 5, 3

        def forward(self, x, mask=None):
            return Transposed()

    moe = vr.MoEMlp(5, num_experts=3, router=Router())
    with pytest.raises(
        ValueError, match=r"the output of the routing must be \[G, T, D\] = \[2, 4, 5\], got \[4, 2, 5\]"
    ):
        moe(torch.randn(2, 4, 5))


@pytest.mark.parametrize(
    ("terms", "error", "words"),
    [
        ({}, ValueError, "loss_weights has 'a', but loss_terms has no such loss"),
        ({"a": lambda: 3.0}, TypeError, "the loss 'a' must be a Tensor, got float"),
        ({"a": lambda: torch.ones(2)}, ValueError, r"the loss 'a' must be a scalar, got shape \[2\]"),
    ],
)
def test_a_loss_of_an_own_routing_is_a_scalar(terms, error, words):
    class Own(vr.Routing):
        loss_terms, loss_weights = terms, {"a": 1.0}
        dispatch = combine = dispatch_tensor = combine_tensor = None

    with pytest.raises(error, match=words):
        _ = Own().aux_loss


def test_record_of_layers_that_share_a_router():
    router = vr.create_router("softmax_expert_choice", 5, 3, noise_std=0.0)
    model = torch.nn.Sequential(*(vr.MoEMlp(5, num_experts=3, router=router) for _ in range(2)))
    with vr.inspect.record(model) as trace:
        x = torch.randn(2, 4, 5)
        model(x)
    assert [len(routings) for routings in trace.routings.values()] == [1, 1]
    torch.testing.assert_close(trace.routings["0"][0].combine_tensor(), router(x).combine_tensor())
