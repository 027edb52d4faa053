"""The auxiliary losses against their formulas in plain Python."""

import math

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers import losses

SPARSE = vr.ROUTERS[:-1]
ALL = {f"{name}_loss_weight": 1.0 for name in ("importance", "load", "balance", "z")}


def softmax(row):
    exp = [math.exp(v - max(row)) for v in row]
    return [v / sum(exp) for v in exp]


def squared_cv(values):
    mean = sum(values) / len(values)
    return sum((v - mean) ** 2 for v in values) / len(values) / mean**2


def naive(name, logits, noisy, std, top_k, mask):
    """Computes the loss of this name. The loss is a mean over the groups, and counts real tokens only."""
    total = 0.0
    for g in range(logits.shape[0]):
        keep = [t for t in range(logits.shape[1]) if mask is None or mask[g, t]]
        rows = [logits[g, t].tolist() for t in keep]
        noisy_rows = [noisy[g, t].tolist() for t in keep]
        E = logits.shape[2]
        if name == "importance":
            gates = [softmax(row) for row in rows]
            total += squared_cv([sum(gate[e] for gate in gates) for e in range(E)])
        elif name == "load" and std > 0:
            load = [0.0] * E
            for row, noisy_row in zip(rows, noisy_rows, strict=True):
                threshold = sorted(noisy_row, reverse=True)[top_k - 1]
                for e in range(E):
                    z = (threshold - row[e]) / std
                    load[e] += (1 - 0.5 * (1 + math.erf(z / math.sqrt(2)))) / len(keep)
            total += squared_cv(load)
        elif name == "balance":
            gates = [softmax(row) for row in noisy_rows]
            first = [max(range(E), key=lambda e: (row[e], -e)) for row in noisy_rows]
            f = [first.count(e) / len(keep) for e in range(E)]
            P = [sum(gate[e] for gate in gates) / len(keep) for e in range(E)]
            total += E * sum(a * b for a, b in zip(f, P, strict=True))
        elif name == "z":
            total += sum(math.log(sum(map(math.exp, row))) ** 2 for row in rows) / len(keep)
    return total / logits.shape[0]


def compute(name, logits, noisy, std, top_k, mask):
    return {
        "importance": lambda: losses.importance_loss(logits, mask),
        "load": lambda: losses.load_loss(logits, noisy, std, top_k, mask),
        "balance": lambda: losses.balance_loss(noisy, mask),
        "z": lambda: losses.z_loss(logits, mask),
    }[name]()


def inputs(G=3, T=9, E=4, std=0.3):
    logits = torch.randn(G, T, E).double() * 2
    return logits, logits + std * torch.randn_like(logits), std


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("name", ["importance", "load", "balance", "z"])
def test_formula(name, top_k, masked):
    logits, noisy, std = inputs()
    mask = torch.rand(3, 9) > 0.4 if masked else None
    got = compute(name, logits, noisy, std, top_k, mask)
    assert got.shape == ()
    assert got.item() == pytest.approx(naive(name, logits, noisy, std, top_k, mask), rel=1e-9)
    assert got > 1e-4


@pytest.mark.parametrize("name", ["importance", "load", "balance", "z"])
def test_gradient(name):
    """Compares with central differences of the formula. A change of the logits changes the noisy logits equally."""
    logits, noisy, std = inputs(2, 4, 3)
    noise = noisy - logits
    mask = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]).bool()
    at = logits.clone().requires_grad_()
    compute(name, at, at + noise, std, 2, mask).backward()
    step = 1e-6
    for index in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        values = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[tuple(index)] += sign * step
            values.append(naive(name, moved, moved + noise, std, 2, mask))
        wanted = (values[0] - values[1]) / (2 * step)
        assert at.grad[tuple(index)].item() == pytest.approx(wanted, abs=1e-7)
    assert (at.grad[~mask] == 0).all()
    assert (at.grad[mask].abs() > 0).any()


def test_the_gradient_of_the_load_flows_through_its_threshold():
    logits, noisy, std = inputs()
    noisy.requires_grad_()
    losses.load_loss(logits, noisy, std, 2).backward()
    touched = noisy.grad != 0
    assert (touched.sum(-1) == 1).all(), "one threshold a token"
    second = noisy.detach().sort(-1, descending=True).indices[..., 1:2]
    assert touched.gather(-1, second).all()


def test_the_load_is_zero_without_noise():
    logits = torch.randn(2, 5, 3, requires_grad=True)
    assert losses.load_loss(logits, logits, 0.0, 1) == 0
    for router in (
        vr.create_router("softmax_token_choice", 6, 3, noise_std=0.0).train(),
        vr.create_router("softmax_token_choice", 6, 3).eval(),
    ):
        assert router(torch.randn(2, 5, 6)).losses["load"] == 0
    assert vr.create_router("softmax_token_choice", 6, 3)(torch.randn(2, 5, 6)).losses["load"] > 0


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("name", ["importance", "load", "balance", "z"])
def test_finite_at_perfect_balance(name, top_k):
    for scale in (0.0, 3.0):  # all logits equal, or every expert chosen once
        logits = (torch.eye(4)[None] * scale).requires_grad_()
        loss = compute(name, logits, logits + 0.0, 0.25, top_k, None)
        loss.backward()
        assert logits.grad.isfinite().all()
        if name in ("importance", "load"):
            assert loss.abs() < 1e-12
            assert logits.grad.abs().max() < 1e-6
        if name == "balance" and scale:
            assert loss.item() == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["importance", "load", "balance", "z"])
def test_finite_far_from_balance(name):
    logits = torch.zeros(2, 5, 4)
    logits[..., 0] = 1e4
    logits.requires_grad_()
    loss = compute(name, logits, logits + 0.0, 0.25, 1, None)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()
    if name in ("importance", "load"):
        assert loss.item() == pytest.approx(3.0)  # E - 1
    if name == "balance":
        assert loss.item() == pytest.approx(4.0)  # E


@pytest.mark.parametrize("name", ["importance", "load", "balance", "z"])
@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 0, 3), (0, 4, 3), (2, 4, 1)])
def test_groups_without_tokens(name, shape):
    logits = torch.randn(shape, requires_grad=True)
    mask = torch.zeros(shape[:2], dtype=torch.bool) if shape == (2, 4, 3) else None
    loss = compute(name, logits, logits + 0.1, 0.25, 1, mask)
    assert loss.isfinite()
    loss.backward()
    assert logits.grad.isfinite().all()
    if shape[2] > 1:
        assert loss == 0


def test_losses_of_float16_do_not_overflow():
    logits = torch.randn(1, 3000, 2) + torch.tensor([2.0, 0.0])
    half, as_wide = logits.half(), logits.half().float()
    for loss in (losses.importance_loss, losses.balance_loss):  # squares and counts of about 3000 tokens
        torch.testing.assert_close(loss(half), loss(as_wide), rtol=0, atol=0)
    torch.testing.assert_close(losses.load_loss(half, half, 1.0, 1), losses.load_loss(as_wide, as_wide, 1.0, 1))
    torch.testing.assert_close(losses.z_loss(300 * half), losses.z_loss((300 * half).float()))


def test_groups_are_independent():
    logits, noisy, std = inputs(G=4)
    for name in ("importance", "load", "balance", "z"):
        each = [compute(name, logits[g : g + 1], noisy[g : g + 1], std, 2, None) for g in range(4)]
        whole = compute(name, logits, noisy, std, 2, None)
        torch.testing.assert_close(whole, torch.stack(each).mean())


# Losses of the routers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SPARSE)
def test_routers(name, training):
    options = {} if name == "sparsity_constrained_expert_choice" else {"noise_std": 2.0}
    top_k = 2 if name.endswith("token_choice") else 1
    if top_k > 1:
        options["top_k"] = top_k
    router = vr.create_router(name, 6, 4, **options, **ALL).double().train(training)
    noise = torch.randn(3, 8, 4).double()
    router.draw_noise = lambda logits: noise
    x = torch.randn(3, 8, 6).double()
    std = 2.0 / 4 if training and options.get("noise_std") else 0.0
    logits = torch.einsum("gtd,ed->gte", x, router.weight.detach())
    routing = router(x)
    assert set(routing.losses) == {"importance", "load", "balance", "z"}
    total = 0.0
    for loss, value in routing.losses.items():
        # For plans, too, the losses use the softmax of the logits.
        wanted = naive(loss, logits, logits + std * noise, std, top_k, None)
        assert value.item() == pytest.approx(wanted, rel=1e-9, abs=1e-12), loss
        total += value.item()
        if std > 0 or loss != "load":
            (grad,) = torch.autograd.grad(value, router.weight, retain_graph=True)
            assert grad.isfinite().all()
            assert grad.abs().max() > 1e-6, f"{loss} does not reach the weight"
    assert routing.aux_loss.item() == pytest.approx(total)


def test_weights():
    x = torch.randn(2, 9, 6)
    options = {"importance_loss_weight": 0.5, "load_loss_weight": 0.0, "z_loss_weight": 0.25}
    routing = vr.create_router("softmax_token_choice", 6, 4, **options)(x)
    torch.testing.assert_close(routing.aux_loss, 0.5 * routing.losses["importance"] + 0.25 * routing.losses["z"])
    routing = vr.create_router("softmax_token_choice", 6, 4)(x)
    torch.testing.assert_close(routing.aux_loss, 0.005 * (routing.losses["importance"] + routing.losses["load"]))
    for name in vr.ROUTERS[1:]:
        routing = vr.create_router(name, 6, 4)(x)
        assert routing.aux_loss == 0, "off by default"


def test_the_order_of_reading_changes_nothing():
    router = vr.create_router("softmax_token_choice", 6, 4, **ALL)
    routing = router(torch.randn(2, 9, 6))
    before = routing.aux_loss
    assert set(routing.losses) == {"importance", "load", "balance", "z"}
    torch.testing.assert_close(routing.aux_loss, before)
    routing.aux_loss.backward()
    assert router.weight.grad.isfinite().all()


@pytest.mark.parametrize("name", ["softmax_token_choice", "softmax_expert_choice"])
def test_masked_tokens_do_not_count(name):
    router = vr.create_router(name, 6, 4, **ALL).double().eval()
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]]).bool()
    real = torch.randn(2, 4, 6).double()
    x = torch.full((2, 6, 6), 50.0).double()
    x[mask] = real.flatten(0, 1)
    alone = router(real).losses
    for loss, value in router(x, mask).losses.items():
        torch.testing.assert_close(value, alone[loss], msg=loss)


@pytest.mark.parametrize("weight", ["importance", "load", "balance", "z"])
@pytest.mark.parametrize("name", SPARSE)
def test_refusals(name, weight):
    with pytest.raises(ValueError, match=rf"{weight}_loss_weight.*>= 0.* -0.5"):
        vr.create_router(name, 6, 4, **{f"{weight}_loss_weight": -0.5})
    with pytest.raises(TypeError, match=rf"{weight}_loss_weight.*number.*str"):
        vr.create_router(name, 6, 4, **{f"{weight}_loss_weight": "1"})


LOGITS = torch.zeros(2, 5, 4)


@pytest.mark.parametrize(
    ("loss", "arguments", "error", "words"),
    [
        ("importance_loss", ([[[0.0]]],), TypeError, "logits.*Tensor.*list"),
        ("importance_loss", (LOGITS[0],), ValueError, r"logits.*\[G, T, E\].*\[5, 4\]"),
        ("importance_loss", (LOGITS, torch.ones(2, 4).bool()), ValueError, r"mask.*\[2, 5\].*\[2, 4\]"),
        ("z_loss", (LOGITS.long(),), TypeError, "logits.*float.*int64"),
        ("z_loss", (LOGITS, torch.ones(2, 5)), TypeError, "mask.*bool.*float32"),
        ("balance_loss", (None,), TypeError, "noisy_logits.*Tensor.*NoneType"),
        ("load_loss", (LOGITS, LOGITS[:1], 1.0, 1), ValueError, r"noisy_logits.*\[2, 5, 4\].*\[1, 5, 4\]"),
        ("load_loss", (LOGITS, LOGITS.to("meta"), 1.0, 1), ValueError, "noisy_logits.*meta.*cpu"),
        ("load_loss", (LOGITS, LOGITS, -1.0, 1), ValueError, "noise_std.*>= 0.* -1"),
        ("load_loss", (LOGITS, LOGITS, 1.0, 5), ValueError, r"top_k.*\[1, 4\].* 5"),
    ],
    ids=range(10),
)
def test_the_functions_refuse(loss, arguments, error, words):
    with pytest.raises(error, match=f"^{loss}: {words}"):
        getattr(losses, loss)(*arguments)
