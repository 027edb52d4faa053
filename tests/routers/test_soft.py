"""Soft MoE against its formulas."""

import math

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.ops import reference
from vmoe_routers.routers import soft as soft_module


def soft(**options):
    options = {"dtype": torch.float64, **options}
    return vr.create_router("soft", 6, 4, slots_per_expert=options.pop("slots", 3), **options)


def naive_logits(router, x):
    """Returns the logits <x / |x|, scale * Phi / |Phi|> [G, T, E, C], computed one number at a time."""
    phi, scale = router.phi.detach().to(x.dtype), router.scale.item()
    _, E, C = phi.shape
    logits = torch.zeros(*x.shape[:2], E, C, dtype=x.dtype)
    for g in range(x.shape[0]):
        for t in range(x.shape[1]):
            unit = x[g, t] / math.sqrt(float(x[g, t] @ x[g, t]) + 1e-6)
            for e in range(E):
                for c in range(C):
                    column = phi[:, e, c]
                    column = scale * column / math.sqrt(float(column @ column) + 1e-6)
                    logits[g, t, e, c] = unit @ column
    return logits


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_tensors_are_the_two_softmaxes(scale, slots):
    router = soft(slots=slots, scale_init=scale)
    x = torch.randn(2, 5, 6).double() * torch.tensor([1e-3, 0.1, 1.0, 30.0, 0.0])[:, None]
    logits = naive_logits(router, x)
    exp = logits.exp()
    D = exp / exp.sum(1, keepdim=True)
    B = exp / exp.sum((2, 3), keepdim=True)
    routing = router(x)
    torch.testing.assert_close(routing.dispatch_tensor(), D, atol=1e-12, rtol=0)
    torch.testing.assert_close(routing.combine_tensor(), B, atol=1e-12, rtol=0)
    y = torch.randn(4, 2, slots, 6).double()
    torch.testing.assert_close(routing.dispatch(x), torch.einsum("gtec,gtd->egcd", D, x))
    torch.testing.assert_close(routing.combine(y), torch.einsum("gtec,egcd->gtd", B, y))


@pytest.mark.parametrize("factor", [1e15, 1e25, 1e35])
def test_the_size_of_phi_changes_nothing(factor):
    """The logits do not depend on the scale of Phi, also if the squares of Phi overflow float32."""
    router = vr.create_router("soft", 6, 4)
    x = torch.randn(2, 5, 6)
    wanted = router(x).logits.detach()
    with torch.no_grad():
        router.phi.mul_(factor)
    logits = router(x).logits
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    logits.square().sum().backward()
    assert router.phi.grad.isfinite().all()
    assert (router.phi.grad * factor).abs().max() > 1e-3


@pytest.mark.parametrize("factor", [1e-30, 1e-20, 1e-5, 1.0, 1e3, 1e7, 1e30])
def test_phi_of_any_size_is_normalised_as_in_float64(factor):
    router = vr.create_router("soft", 6, 4)
    x, grad = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    with torch.no_grad():
        router.phi.mul_(factor)
    logits = router(x).logits
    logits.backward(grad)
    phi = router.phi.detach().double().flatten(1).requires_grad_()
    unit = phi / (phi.square().sum(0) + 1e-6).sqrt()
    wanted = x.double() / (x.double().square().sum(2, keepdim=True) + 1e-6).sqrt() @ unit
    wanted.backward(grad.double())
    size = wanted.detach().abs().amax()
    torch.testing.assert_close(logits.double() / size, wanted / size, atol=1e-6, rtol=0)
    slope = phi.grad.abs().amax()
    torch.testing.assert_close(router.phi.grad.double().flatten(1) / slope, phi.grad / slope, atol=1e-6, rtol=0)


def test_usual_phi_is_normalised_without_another_rounding():
    logits = vr.create_router("soft", 48, 8, slots_per_expert=3).logits
    x = torch.randn(2, 5, 48)
    phi = logits.phi.flatten(1)
    unit = phi * (phi.square().sum(0, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(logits(x), vr.ops.soft_logits(x, logits.scale * unit))


@pytest.mark.parametrize("factor", [0.0, 0.01, 1.0, 1e3])
def test_logits_in_float16(factor, monkeypatch):
    """Another runtime may compute an exported router in float16."""
    router = vr.create_router("soft", 48, 8, slots_per_expert=3)
    x = torch.randn(2, 5, 48) * torch.tensor([0.0, 0.1, 1.0, 30.0, 1e3])[:, None]
    with torch.no_grad():
        router.phi.mul_(factor)
        wanted = router(x).logits
        monkeypatch.setattr(soft_module, "compute_dtype", lambda dtype: torch.float16)
        monkeypatch.setattr(soft_module, "soft_logits_unchecked", reference.soft_logits)
        monkeypatch.setattr(reference, "_wide", lambda x: x)
        logits = router(x.half()).logits
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), wanted, atol=2e-3, rtol=1e-2)


def test_weights_sum_to_one():
    routing = soft(scale_init=20.0)(torch.randn(3, 17, 6).double())
    D, B = routing.dispatch_tensor(), routing.combine_tensor()
    assert D.min() >= 0
    assert B.min() >= 0
    torch.testing.assert_close(D.sum(1), torch.ones(3, 4, 3).double())
    torch.testing.assert_close(B.sum((2, 3)), torch.ones(3, 17).double())


def test_permuting_tokens_permutes_outputs():
    router = soft(scale_init=5.0)
    x = torch.randn(2, 9, 6).double()
    order = torch.randperm(9)
    routing, permuted = router(x), router(x[:, order])
    y = torch.randn(4, 2, 3, 6).double()
    torch.testing.assert_close(permuted.dispatch(x[:, order]), routing.dispatch(x))
    torch.testing.assert_close(permuted.combine(y), routing.combine(y)[:, order])


def test_a_huge_scale_is_a_hard_assignment():
    # There are as many slots as tokens, and Phi of each slot has the direction of a different token.
    router = vr.create_router("soft", 12, 4, slots_per_expert=3, scale_init=1e4).double()
    x = torch.linalg.qr(torch.randn(12, 12).double())[0]
    place = torch.randperm(12)
    with torch.no_grad():
        router.phi.copy_(x[place].T.reshape(12, 4, 3) * 0.3)
    x = (x * torch.linspace(0.5, 4, 12)[:, None])[None]
    routing = router(x)
    hard = torch.zeros(12, 12).double()
    hard[place, torch.arange(12)] = 1
    hard = hard.reshape(1, 12, 4, 3)
    torch.testing.assert_close(routing.dispatch_tensor(), hard, atol=1e-9, rtol=0)
    torch.testing.assert_close(routing.combine_tensor(), hard, atol=1e-9, rtol=0)
    torch.testing.assert_close(routing.combine(routing.dispatch(x)), x, atol=1e-8, rtol=0)


def test_equal_logits_give_means():
    router = soft()
    torch.nn.init.zeros_(router.phi)
    x = torch.randn(2, 5, 6).double()
    routing = router(x)
    wanted = x.mean(1)[:, None].expand(4, 2, 3, 6)
    torch.testing.assert_close(routing.dispatch(x), wanted)
    y = torch.randn(4, 2, 3, 2).double()
    wanted = y.mean((0, 2))[:, None].expand(2, 5, 2)
    torch.testing.assert_close(routing.combine(y), wanted)


def test_noise_in_training_is_not_divided_by_experts():
    router = vr.create_router("soft", 6, 8, slots_per_expert=16, noise_std=0.5)
    x = torch.randn(4, 200, 6)
    clean = router.eval()(x).logits
    assert torch.equal(router(x).logits, clean), "none in eval"
    noise = (router.train()(x).logits - clean).detach()
    assert noise.numel() == 4 * 200 * 8 * 16
    assert abs(noise.std() - 0.5) < 0.01
    assert abs(noise.mean()) < 0.01
    # Every slot, token and group has its own noise.
    assert noise.flatten().unique().numel() > 0.5 * noise.numel()
    quiet = vr.create_router("soft", 6, 8)
    assert torch.equal(quiet.train()(x).logits, quiet.eval()(x).logits), "off by default"


def test_phi_at_the_start():
    router = vr.create_router("soft", 64, 16, slots_per_expert=8)
    assert router.phi.shape == (64, 16, 8)
    assert router.scale.shape == (1,)
    assert router.scale == 1
    assert {name for name, _ in router.named_parameters()} == {"logits.phi", "logits.scale"}
    assert router.phi.abs().max() <= 2 / 8
    # A normal distribution truncated at two standard deviations has 0.8796 of its standard deviation.
    assert abs(router.phi.std() * 8 - 0.8796) < 0.03
    assert vr.create_router("soft", 8, 4, scale_init=16.0).scale == 16


@pytest.mark.parametrize(
    ("factor", "tokens", "experts", "slots"),
    [(1.0, 49, 8, 6), (1.0, 16, 32, 1), (2.0, 16, 32, 1), (0.5, 20, 4, 2), (0.5, 28, 4, 4)],
)
def test_slots_by_factor(factor, tokens, experts, slots):
    router = vr.create_router("soft", 8, experts, capacity_factor=factor, num_tokens=tokens)
    assert router.phi.shape == (8, experts, slots)  # round, half to even, at least 1
    assert router(torch.randn(2, tokens + 3, 8)).capacity == slots, "Phi has its shape for good"


@pytest.mark.parametrize("garbage", [0.0, 1e4, math.inf, math.nan])
def test_masked_tokens_neither_contribute_nor_receive(garbage):
    router = soft(scale_init=4.0)
    mask = torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1, 1]]).bool()
    real = torch.randn(2, 5, 6).double()
    x = torch.full((2, 7, 6), garbage).double()
    x[mask] = real.flatten(0, 1)
    routing, alone = router(x, mask), router(real)
    y = torch.randn(4, 2, 3, 6).double()
    torch.testing.assert_close(routing.dispatch(x), alone.dispatch(real))
    out = routing.combine(y)
    torch.testing.assert_close(out[mask], alone.combine(y).flatten(0, 1))
    assert (out[~mask] == 0).all()
    assert (routing.dispatch_tensor()[~mask] == 0).all()
    assert (routing.combine_tensor()[~mask] == 0).all()
    for name, value in alone.metrics.items():
        torch.testing.assert_close(routing.metrics[name], value, msg=name)


def test_a_group_of_masked_tokens_only():
    router = soft()
    x = torch.randn(2, 5, 6).double().requires_grad_()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1] = False
    routing = router(x, mask)
    slots = routing.dispatch(x)
    out = routing.combine(slots + 1)
    assert (slots[:, 1] == 0).all()
    assert (out[1] == 0).all()
    assert (routing.dispatch_tensor()[1] == 0).all()
    (out.sum() + out.square().sum()).backward()
    for grad in (x.grad, router.phi.grad, router.scale.grad):
        assert grad.isfinite().all()
    assert (x.grad[1] == 0).all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 1)])
def test_small_groups(shape):
    router = soft()
    x = torch.randn(*shape, 6).double().requires_grad_()
    routing = router(x)
    slots = routing.dispatch(x)
    assert slots.shape == (4, shape[0], 3, 6)
    if shape[1] == 0:
        assert (slots == 0).all(), "no token, no input"
    if shape[1] == 1:
        torch.testing.assert_close(slots, x.expand(2, 3, 6).expand(4, 2, 3, 6))
    out = routing.combine(slots)
    assert out.shape == x.shape
    out.sum().backward()
    assert router.phi.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_token_stays_in_its_group(bad):
    router = soft()
    x = torch.randn(3, 5, 6).double()
    clean = router(x)
    slots = clean.dispatch(x)
    x[1, 2, 3] = bad
    routing = router(x)
    got = routing.dispatch(x)
    assert torch.equal(got[:, [0, 2]], slots[:, [0, 2]])
    assert got[:, 1].isnan().all(), "and does not pass unseen"


def test_zero_tokens_and_large_ones():
    router = soft(dtype=torch.float32, scale_init=1e3)
    x = torch.randn(2, 6, 6)
    x[0, 0] = 0
    x[0, 1] *= 1e4
    x[1] *= 1e-4
    x.requires_grad_()
    routing = router(x)
    out = routing.combine(routing.dispatch(x))
    assert out.isfinite().all()
    out.sum().backward()
    for grad in (x.grad, router.phi.grad, router.scale.grad):
        assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 39.0, 1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_of_any_length_at_any_scale(dtype, scale):
    router = soft(dtype=dtype, scale_init=scale)
    length = torch.tensor([0, 1e-20, 1e-4, 1, 1e4, 1e18]).to(dtype)
    x = (torch.randn(3, 6, 6, dtype=dtype) * length[:, None]).requires_grad_()
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    mask[2, 3:] = False
    for keep in (None, mask):
        routing = router(x, keep)
        exact = naive_logits(router, x.detach().double()).flatten(2)
        real = torch.ones(3, 6, dtype=torch.bool) if keep is None else keep
        # A product of 16-bit tokens has a rounding error of an epsilon of the scale.
        atol = 20 * scale * torch.finfo(dtype).eps
        torch.testing.assert_close(routing.logits.detach().double()[real], exact[real], atol=atol, rtol=0)
        out = routing.combine(routing.dispatch(x).tanh())
        grads = torch.autograd.grad(out.square().sum(), (x, router.phi, router.scale))
        assert all(value.isfinite().all() for value in (out, *grads))


@pytest.mark.parametrize("shape", [(5, 3, 2, 8), (49, 8, 6, 64), (196, 16, 12, 48)])
def test_an_image_does_not_depend_on_its_batch_to_the_last_bit(shape):
    tokens, experts, slots, width = shape
    router = vr.create_router("soft", width, experts, slots_per_expert=slots, scale_init=4.0).eval()
    x = torch.randn(9, tokens, width)
    routing = router(x)
    mixed = routing.dispatch(x)
    out = routing.combine(mixed)
    for g in (0, 4, 8):
        alone = router(x[g : g + 1])
        assert torch.equal(alone.dispatch(x[g : g + 1])[:, 0], mixed[:, g])
        assert torch.equal(alone.combine(mixed[:, g : g + 1])[0], out[g])


def test_backward_keeps_one_matrix_of_tokens_by_slots():
    G, T, E, C, D = 3, 20, 4, 6, 16
    router = vr.create_router("soft", D, E, slots_per_expert=C)
    x = torch.randn(G, T, D, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        routing = router(x)
        slots = routing.dispatch(x)
        routing.combine(slots)
    sizes = sorted(tensor.untyped_storage().nbytes() // 4 for tensor in kept.values())
    # The large tensors are the logits, the tokens and the slots. All other tensors are at most as large as Phi.
    assert [size for size in sizes if size > D * E * C] == sorted([G * T * E * C, G * T * D, G * E * C * D])
    assert {x.data_ptr(), slots.data_ptr(), routing.logits.data_ptr()} <= kept.keys()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"slots_per_expert": 0}, ValueError, "slots_per_expert.*>= 1.* 0"),
        ({"slots_per_expert": 1.5}, TypeError, "slots_per_expert.*int.*float"),
        ({"slots_per_expert": 2, "capacity_factor": 1.0}, ValueError, "slots_per_expert.*not both"),
        ({"capacity_factor": 1.0}, ValueError, "capacity_factor needs num_tokens"),
        ({"capacity_factor": 0.0, "num_tokens": 4}, ValueError, "capacity_factor.*> 0.* 0"),
        ({"capacity_factor": 1.0, "num_tokens": 0}, ValueError, "num_tokens.*>= 1.* 0"),
        ({"scale_init": 0.0}, ValueError, "scale_init.*> 0.* 0"),
        ({"noise_std": -1.0}, ValueError, "noise_std.*>= 0.* -1"),
        ({"noise_std": "1"}, TypeError, "noise_std.*number.*str"),
        ({"top_k": 2}, TypeError, "'soft'.*'top_k'.*slots_per_expert"),
        ({"batch_priority": True}, TypeError, "'soft'.*'batch_priority'"),
    ],
)
def test_refusals(options, error, words):
    with pytest.raises(error, match=words):
        vr.create_router("soft", 8, 4, **options)
