"""Properties that all six routers share: names, input checks, noise, masks, edge cases, refusals."""

import copy
import math
import pickle

import pytest
import torch

import vmoe_routers as vr

SPARSE = vr.ROUTERS[:-1]
# Every router. Routers with a plan appear a second time, with entries of the plan as gates.
CASES = [(name, {}) for name in vr.ROUTERS] + [
    (name, {"combine": "plan"}) for name in vr.ROUTERS if name.startswith(("sinkhorn", "sparsity"))
]


def tables(routing):
    return routing.dispatch_tensor(), routing.combine_tensor()


def assert_same_tables(routing, wanted):
    for got, want in zip(tables(routing), wanted, strict=True):
        assert torch.equal(got, want)


# Names


def test_the_six_names():
    assert tuple(vr.ROUTERS) == (
        "softmax_token_choice",
        "sinkhorn_token_choice",
        "softmax_expert_choice",
        "sinkhorn_expert_choice",
        "sparsity_constrained_expert_choice",
        "soft",
    )
    for name in vr.ROUTERS:
        router = vr.create_router(name, 8, 4)
        assert isinstance(router, torch.nn.Module)
        assert type(router) is (
            vr.TokenChoiceRouter
            if name.endswith("token_choice")
            else vr.ExpertChoiceRouter
            if name.endswith("expert_choice")
            else vr.SoftRouter
        )


@pytest.mark.parametrize(
    ("name", "composed"),
    [
        ("softmax_token_choice", lambda: vr.TokenChoiceRouter(6, 4, vr.affinity.Softmax())),
        (
            "sinkhorn_token_choice",
            lambda: vr.TokenChoiceRouter(6, 4, vr.affinity.Sinkhorn(noisy_softmax=False)),
        ),
        ("softmax_expert_choice", lambda: vr.ExpertChoiceRouter(6, 4)),
        ("sinkhorn_expert_choice", lambda: vr.ExpertChoiceRouter(6, 4, vr.affinity.Sinkhorn())),
        (
            "sparsity_constrained_expert_choice",
            lambda: vr.ExpertChoiceRouter(6, 4, vr.affinity.SparsityConstrained(), noise_std=0.0),
        ),
        ("soft", lambda: vr.SoftRouter(6, 4)),
    ],
)
def test_a_name_is_a_composition(name, composed):
    torch.manual_seed(1)
    by_name = vr.create_router(name, 6, 4)
    torch.manual_seed(1)
    by_hand = composed()
    x = torch.randn(2, 9, 6)
    torch.manual_seed(2)
    wanted = tables(by_name(x))
    torch.manual_seed(2)
    assert_same_tables(by_hand(x), wanted)


def test_token_choice_takes_the_sparse_plan():
    router = vr.TokenChoiceRouter(6, 4, vr.affinity.SparsityConstrained(), top_k=2).eval()
    x = torch.randn(2, 8, 6)
    routing = router(x)
    S = torch.einsum("gtd,ed->gte", x, router.weight).softmax(-1)
    plan = vr.ksparse_transport(S, min(routing.capacity, 8))
    wanted = vr.token_choice(plan, 2, routing.capacity, weights=S)
    assert torch.equal(routing.dispatch_tensor(), wanted.dispatch_tensor())
    torch.testing.assert_close(routing.combine_tensor(), wanted.combine_tensor())


# The front end


@pytest.mark.parametrize("name", SPARSE)
def test_the_weight_at_the_start(name):
    router = vr.create_router(name, 100, 400)
    assert [key for key, _ in router.named_parameters()] == ["logits.weight"]
    assert router.weight.shape == (400, 100)
    assert abs(router.weight.std() * 10 - 1) < 0.02
    assert router.weight.abs().max() <= 2.28 / 10  # truncated
    assert router.weight.abs().max() >= 2.2 / 10


@pytest.mark.parametrize(("name", "options"), CASES)
def test_eval_is_deterministic(name, options):
    router = vr.create_router(name, 6, 4, **options)
    if name != "sparsity_constrained_expert_choice":
        router.noise_std = 5.0
    x = torch.randn(2, 9, 6)
    first = tables(router.eval()(x))
    for got, wanted in zip(tables(router(x)), first, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", vr.ROUTERS)
def test_the_seed_makes_training_repeat_itself(name):
    options = {} if name == "sparsity_constrained_expert_choice" else {"noise_std": 2.0}
    router = vr.create_router(name, 6, 4, **options)
    x = torch.randn(2, 9, 6)
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        runs.append(tables(router(x))[1])
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2]) == (not options)


def test_noise_is_divided_by_the_experts():
    E = 8
    for noise_std in (1.0, 3.0):
        router = vr.create_router("softmax_token_choice", 4, E, noise_std=noise_std)
        torch.nn.init.zeros_(router.weight)
        noisy = router(torch.randn(2, 20000, 4)).weights.detach().log()
        # The log of a gate is the noise minus the logsumexp of its token.
        noise = noisy - noisy.mean(-1, keepdim=True)
        std = noise.std() / math.sqrt(1 - 1 / E)
        assert std.item() == pytest.approx(noise_std / E, rel=0.01)


def test_the_default_noise():
    for name in SPARSE:
        wanted = 0.0 if name == "sparsity_constrained_expert_choice" else 1.0
        assert vr.create_router(name, 6, 4).noise_std == wanted
    assert vr.create_router("soft", 6, 4).noise_std == 0.0


def test_noise_of_sinkhorn_token_choice_is_in_the_plan_only():
    x = torch.randn(2, 30, 6)
    changed = {}
    for name in SPARSE[:-1]:
        router = vr.create_router(name, 6, 4, noise_std=8.0)
        clean = torch.einsum("gtd,ed->gte", x, router.weight).softmax(-1)
        routing = router(x)
        changed[name] = not torch.allclose(routing.weights, clean)
        quiet = router.eval()(x).dispatch_tensor()
        assert not torch.equal(routing.dispatch_tensor().sum(-1), quiet.sum(-1)), "it selects"
    assert changed == {name: name != "sinkhorn_token_choice" for name in SPARSE[:-1]}


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_routing_runs_in_float32(name, options, dtype):
    router = vr.create_router(name, 6, 4, **options).eval()
    narrow = copy.deepcopy(router).to(dtype)
    router.load_state_dict(narrow.state_dict())  # the rounded weights
    x = torch.randn(2, 12, 6).to(dtype)
    wanted = tables(router(x.float()))
    for got, want in zip(tables(narrow(x)), wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x.float())
    for got, want in zip(tables(routing), wanted, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_strides_do_not_matter(name, options):
    router = vr.create_router(name, 6, 4, **options).eval()
    x = torch.randn(2, 9, 6)
    wanted = tables(router(x))
    apart = torch.empty(2, 9, 12)[..., ::2].copy_(x)
    turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for other in (apart, turned):
        assert not other.is_contiguous()
        for got, want in zip(tables(router(other)), wanted, strict=True):
            torch.testing.assert_close(got, want)
    mask = torch.rand(9, 2).T > 0.3
    assert_same_tables(router(x, mask), tables(router(x, mask.contiguous())))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_copies(name, options):
    router = vr.create_router(name, 6, 4, **options).eval()
    x = torch.randn(2, 9, 6)
    wanted = tables(router(x))
    other = vr.create_router(name, 6, 4, **options).eval()
    other.load_state_dict(router.state_dict())
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router)), other):
        assert_same_tables(twin(x), wanted)
        assert repr(twin) == repr(router)


# Masks


@pytest.mark.parametrize(("name", "options"), CASES)
def test_padding_does_not_affect_other_tokens(name, options):
    """Both runs have the same number of slots, because the default capacity counts padded tokens, too."""
    real, padded, E = 10, 16, 4
    slots = 3
    order = torch.randperm(padded)
    mask = torch.zeros(2, padded, dtype=torch.bool)
    mask[0, order[:real]] = mask[1, order[-real:]] = True
    tokens = torch.randn(2, real, 6).double()
    x = torch.full((2, padded, 6), 20.0).double()  # larger than the real tokens
    x[mask] = tokens.flatten(0, 1)
    made = []
    for length in (real, padded):
        torch.manual_seed(0)
        if name == "soft":
            extra = {"slots_per_expert": slots}
        else:
            extra = {"capacity_factor": slots * E / length, "capacity_multiple_of": 1}
        made.append(vr.create_router(name, 6, E, dtype=torch.float64, **options, **extra).eval())
    alone, routing = made[0](tokens), made[1](x, mask)
    assert alone.capacity == routing.capacity == slots
    for got, want in zip(tables(routing), tables(alone), strict=True):
        assert (got[~mask] == 0).all()
        torch.testing.assert_close(got[mask], want.flatten(0, 1), atol=1e-12, rtol=0)
    y = torch.randn(E, 2, slots, 6).double()
    out = routing.combine(y)
    assert (out[~mask] == 0).all(), "exactly zero"
    torch.testing.assert_close(out[mask], alone.combine(y).flatten(0, 1))
    torch.testing.assert_close(routing.dispatch(x), alone.dispatch(tokens))
    assert routing.metrics.keys() == alone.metrics.keys()
    for key, want in alone.metrics.items():
        torch.testing.assert_close(routing.metrics[key], want, msg=key)
    for key, want in alone.losses.items():
        torch.testing.assert_close(routing.losses[key], want, msg=key)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_of_padded_tokens_affect_nothing(name, options, garbage):
    """The values of padded tokens reach neither outputs nor gradients."""
    router = vr.create_router(name, 6, 4, **options)
    mask = torch.rand(2, 9) < 0.6
    tokens = torch.randn(2, 9, 6)
    found = []
    for padding in (0.0, garbage):
        x = torch.where(mask.unsqueeze(2), tokens, padding).requires_grad_()
        torch.manual_seed(1)  # for equal noise
        routing = router(x, mask)
        out = routing.combine(routing.dispatch(x) + 1)
        loss = out.square().sum() + routing.aux_loss
        found.append([out, *tables(routing), *torch.autograd.grad(loss, [x, *router.parameters()])])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_group_of_masked_tokens_only(name, options, training):
    weights = {"balance_loss_weight": 1.0, "z_loss_weight": 1.0} if name != "soft" else {}
    router = vr.create_router(name, 6, 4, **options, **weights).train(training)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1] = False
    x = torch.randn(3, 9, 6, requires_grad=True)
    routing = router(x, mask)
    for tensor in tables(routing):
        assert tensor.isfinite().all()
        assert (tensor[1] == 0).all()
    out = routing.combine(routing.dispatch(x) + 1)
    assert (out[1] == 0).all()
    (out.square().sum() + routing.aux_loss).backward()
    for parameter in (x, *router.parameters()):
        assert parameter.grad.isfinite().all()
    assert (x.grad[1] == 0).all()
    assert all(value.isfinite().all() for value in routing.metrics.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_mask_of_true_is_no_mask(name, options):
    router = vr.create_router(name, 6, 4, **options).eval()
    x = torch.randn(2, 9, 6)
    mask = torch.ones(2, 9, dtype=torch.bool)
    assert_same_tables(router(x, mask), tables(router(x)))


# Odd input


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_bad_token_stays_in_its_group(name, options, bad):
    router = vr.create_router(name, 6, 4, **options).eval()
    x = torch.randn(3, 9, 6)
    wanted = tables(router(x))
    x[1, 4, 2] = bad
    routing = router(x)
    for got, want in zip(tables(routing), wanted, strict=True):
        assert torch.equal(got[[0, 2]], want[[0, 2]])
    out = routing.combine(routing.dispatch(x))
    assert out[[0, 2]].isfinite().all()
    if name != "soft":
        D = routing.dispatch_tensor()
        assert set(D.unique().tolist()) == {0.0, 1.0}
        assert D.sum(1).max() <= 1
        assert D.sum(3).max() <= 1
    assert routing.metrics.keys()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_all_logits_equal(name, options):
    """All gates are 1/E, and ties go to the lower index."""
    router = vr.create_router(name, 6, 4, **options).eval()
    for parameter in router.parameters():
        torch.nn.init.zeros_(parameter)
    routing = router(torch.randn(2, 8, 6))
    D, B = tables(routing)
    if name == "soft":
        torch.testing.assert_close(D, torch.full_like(D, 1 / 8))
        torch.testing.assert_close(B, torch.full_like(B, 1 / B[0, 0].numel()))
        return
    wanted = torch.zeros_like(D)
    if name.endswith("token_choice"):
        for t in range(routing.capacity):
            wanted[:, t, 0, t] = 1
    else:
        for c in range(routing.capacity):
            wanted[:, c, :, c] = 1
    assert torch.equal(D, wanted)
    # A sparse plan divides the mass n/E of a column among its C tokens, here 2 among 2.
    sparse_plan = name.startswith("sparsity") and options
    torch.testing.assert_close(B, D * (1.0 if sparse_plan else 0.25))


@pytest.mark.parametrize("scale", [1e4, 1e-30])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_extreme_logits(name, options, scale):
    router = vr.create_router(name, 6, 4, **options).eval()
    x = (torch.randn(2, 9, 6) * scale).requires_grad_()
    routing = router(x)
    out = routing.combine(routing.dispatch(x / scale))
    assert out.isfinite().all()
    out.sum().backward()
    for parameter in (x, *router.parameters()):
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1), (2, 3)])
@pytest.mark.parametrize("experts", [1, 2, 16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_small_groups(name, options, experts, shape):
    router = vr.create_router(name, 6, experts, **options).train()
    x = torch.randn(*shape, 6, requires_grad=True)
    routing = router(x)
    slots = routing.dispatch(x)
    assert slots.shape == (experts, shape[0], routing.capacity, 6)
    out = routing.combine(slots)
    assert out.shape == x.shape
    (out.sum() + routing.aux_loss).backward()
    for parameter in (x, *router.parameters()):
        assert parameter.grad.isfinite().all()
    assert all(value.isfinite().all() for value in routing.metrics.values())


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("name", ["softmax_token_choice", "softmax_expert_choice", "soft"])
def test_all_results_of_a_routing_compile(name):
    torch._dynamo.reset()
    router = vr.create_router(name, 6, 4).eval()

    def tell(x):
        routing = router(x)
        return routing.dispatch(x), *tables(routing), routing.losses, routing.aux_loss, routing.metrics

    x = torch.randn(2, 7, 6)
    compiled = torch.compile(tell, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), tell(x))


@pytest.mark.parametrize(("name", "options"), CASES[:5] + CASES[6:])
def test_no_tensor_of_tokens_times_slots(name, options):
    """No tensor of this size is kept for the gradient, and none is made in the forward."""
    G, T, D, E = 1, 256, 8, 16
    router = vr.create_router(name, D, E, capacity_factor=4.0, **options)
    x = torch.randn(G, T, D, requires_grad=True)
    saved, made = [], []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor):
                    made.append(value.numel())
            return out

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Sizes():
        routing = router(x)
        (routing.combine(routing.dispatch(x)).sum() + routing.aux_loss).backward()
        assert routing.metrics["dropped"] >= 0
    slots = E * routing.capacity
    assert slots >= 4 * T
    assert saved
    largest = slots * D  # the experts' inputs
    assert T * E < largest < T * slots // 10
    assert max(saved) <= largest
    assert max(made) <= largest


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("softmax", {}, ValueError, "create_router: name.*'softmax_token_choice'.*got 'softmax'"),
        (None, {}, ValueError, "create_router: name.*got None"),
        ("softmax_token_choice", {"k": 2}, TypeError, "create_router.*'k'.*top_k"),
        ("softmax_token_choice", {"iterations": 2}, TypeError, "create_router.*'iterations'"),
        ("softmax_expert_choice", {"top_k": 2}, TypeError, "create_router.*'top_k'"),
        ("softmax_expert_choice", {"batch_priority": True}, TypeError, "'batch_priority'"),
        ("softmax_token_choice", {"top_k": 0}, ValueError, r"top_k.*\[1, 4\].* 0"),
        ("softmax_token_choice", {"top_k": 5}, ValueError, r"top_k.*\[1, 4\].* 5"),
        ("softmax_token_choice", {"top_k": 1.0}, TypeError, "top_k.*int.*float"),
        ("sinkhorn_token_choice", {"capacity_factor": 0}, ValueError, "capacity_factor.*> 0.* 0"),
        ("sinkhorn_token_choice", {"capacity_factor": -1.5}, ValueError, "capacity_factor.* -1.5"),
        ("sinkhorn_token_choice", {"capacity_factor": "1"}, TypeError, "capacity_factor.*str"),
        ("softmax_expert_choice", {"eval_capacity_factor": 0.0}, ValueError, "eval_capacity_factor"),
        ("softmax_expert_choice", {"capacity_rounding": "up"}, ValueError, "rounding.*'ceil'.*'up'"),
        ("softmax_expert_choice", {"capacity_multiple_of": -1}, ValueError, "multiple_of.* -1"),
        ("softmax_expert_choice", {"noise_std": -1}, ValueError, "noise_std.*>= 0.* -1"),
        ("softmax_expert_choice", {"noise_std": math.nan}, ValueError, "noise_std.*nan"),
        ("sinkhorn_expert_choice", {"combine": "both"}, ValueError, "combine.*'softmax', 'plan'.*'both'"),
        ("sinkhorn_expert_choice", {"iterations": 0}, ValueError, "iterations.*>= 1.* 0"),
        ("sinkhorn_expert_choice", {"iterations": 2.5}, TypeError, "iterations.*int.*float"),
        ("sinkhorn_expert_choice", {"epsilon": 0.0}, ValueError, "epsilon.*> 0.* 0"),
        ("sinkhorn_expert_choice", {"tolerance": -1.0}, ValueError, "tolerance.*> 0.* -1"),
        ("sinkhorn_expert_choice", {"gradient": "none"}, ValueError, "gradient.*'unrolled'.*'none'"),
        ("sinkhorn_expert_choice", {"noisy_softmax": 1}, TypeError, "noisy_softmax.*bool.*int"),
        ("sparsity_constrained_expert_choice", {"combine": 1}, ValueError, "combine.*'plan'.* 1"),
        ("sparsity_constrained_expert_choice", {"iterations": -1}, ValueError, "iterations.* -1"),
        ("sparsity_constrained_expert_choice", {"learning_rate": 0}, ValueError, "learning_rate.* 0"),
        ("sparsity_constrained_expert_choice", {"epsilon": 1.0}, TypeError, "'epsilon'"),
    ],
)
def test_create_router_refuses(name, options, error, words):
    with pytest.raises(error, match=words):
        vr.create_router(name, 8, 4, **options)


@pytest.mark.parametrize("affinity", ["sinkhorn", vr.affinity.Sinkhorn])
def test_an_affinity_is_an_object(affinity):
    with pytest.raises(TypeError, match=r"TokenChoiceRouter: affinity must be an Affinity such as Sinkhorn\(\), got "):
        vr.TokenChoiceRouter(8, 4, affinity=affinity)


@pytest.mark.parametrize("name", vr.ROUTERS)
def test_sizes_are_checked(name):
    for sizes, error, words in (
        ((0, 4), ValueError, "dim.*>= 1.* 0"),
        ((8.0, 4), TypeError, "dim.*int.*float"),
        ((8, 0), ValueError, "num_experts.*>= 1.* 0"),
        ((8, None), TypeError, "num_experts.*int.*NoneType"),
    ):
        with pytest.raises(error, match=words):
            vr.create_router(name, *sizes)


@pytest.mark.parametrize("name", vr.ROUTERS)
def test_a_wrong_option_names_the_valid_options(name):
    with pytest.raises(TypeError, match="capacity_facto") as raised:
        vr.create_router(name, 8, 4, capacity_facto=1.0)
    assert "capacity_factor" in str(raised.value)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("x", "mask", "error", "words"),
    [
        (torch.zeros(9, 6), None, ValueError, r"x.*3 axes.*\[9, 6\]"),
        (torch.zeros(2, 9, 5), None, ValueError, r"x.*6.*\[2, 9, 5\]"),
        (torch.zeros(2, 9, 6).long(), None, TypeError, "x.*float.*int64"),
        (torch.zeros(2, 9, 6, device="meta"), None, ValueError, "x.*meta.*cpu"),
        ("x", None, TypeError, "x.*Tensor.*str"),
        (torch.zeros(2, 9, 6), torch.ones(2, 8).bool(), ValueError, r"mask.*\[2, 9\].*\[2, 8\]"),
        (torch.zeros(2, 9, 6), torch.ones(1, 9).bool(), ValueError, r"mask.*\[2, 9\].*\[1, 9\]"),
        (torch.zeros(2, 9, 6), torch.ones(9).bool(), ValueError, r"mask.*2 axes.*\[9\]"),
        (torch.zeros(2, 9, 6), torch.ones(2, 9), TypeError, "mask.*bool.*float32"),
        (torch.zeros(2, 9, 6), [[True]], TypeError, "mask.*Tensor.*list"),
        (
            torch.zeros(2, 9, 6),
            torch.ones(2, 9, device="meta").bool(),
            ValueError,
            "mask.*meta.*cpu",
        ),
    ],
    ids=range(11),
)
@pytest.mark.parametrize("name", vr.ROUTERS)
def test_forward_refuses(name, x, mask, error, words):
    router = vr.create_router(name, 6, 4)
    before = copy.deepcopy(router.state_dict())
    good = torch.randn(2, 9, 6)
    wanted = tables(router.eval()(good))
    random = torch.get_rng_state()
    with pytest.raises(error, match=words) as raised:
        router.train()(x, mask)
    assert str(raised.value).startswith(type(router).__name__ + ": ")
    assert torch.equal(torch.get_rng_state(), random), "no noise was drawn"
    for key, value in router.state_dict().items():
        assert torch.equal(value, before[key])
    assert_same_tables(router.eval()(good), wanted)


@pytest.mark.parametrize(
    ("affinity", "error", "words"),
    [
        (lambda g: g, TypeError, "affinity must return the gates that select and that weigh, got Tensor"),
        (lambda g: (g, g, g), TypeError, "got 3 values"),
        (lambda g: (g, None), TypeError, "the affinity's weighing gates must be a Tensor, got NoneType"),
        (lambda g: (g.int(), g), TypeError, "the affinity's selecting gates must be float16"),
        (
            lambda g: (g[..., :2],) * 2,
            ValueError,
            r"selecting gates must be \[G, T, E\] = \[2, 6, 4\], got \[2, 6, 2\]",
        ),
        (lambda g: (g, torch.cat([g, g], 1)), ValueError, r"weighing gates must be .*, got \[2, 12, 4\]"),
        (lambda g: (g[:1],) * 2, ValueError, r"selecting gates must be .*, got \[1, 6, 4\]"),
        (lambda g: (g.to("meta"),) * 2, ValueError, "selecting gates is on meta and the logits on cpu"),
    ],
)
@pytest.mark.parametrize("router", [vr.TokenChoiceRouter, vr.ExpertChoiceRouter])
def test_the_gates_of_an_affinity_are_checked(router, affinity, error, words):
    made = router(8, 4, affinity=lambda logits, noisy, capacity, mask: affinity(logits))
    with pytest.raises(error, match=words):
        made(torch.randn(2, 6, 8))


@pytest.mark.parametrize("name", ["softmax_expert_choice", "soft"])
def test_routings_are_compared_by_identity(name):
    router, x = vr.create_router(name, 4, 2), torch.randn(1, 3, 4)
    first, second = router(x), router(x)
    other = first
    assert (first == other, first != other, first == second, first != second) == (True, False, False, True)
    assert len({first, second}) == 2
