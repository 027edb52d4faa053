"""Training is safe: finite gradients in degenerate cases, 16 bits as stable as 32, and named faults."""

from __future__ import annotations

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.models import vit_moe
from vmoe_routers.training import Optimisation, Trainer, TrainingError

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.cpu_kernels]
CASES = [(name, {}) for name in vr.ROUTERS] + [
    (name, {"combine": "plan"}) for name in vr.ROUTERS if name.startswith(("sinkhorn", "sparsity"))
]
LOSSES = {f"{name}_loss_weight": 0.1 for name in ("importance", "load", "balance", "z")}


def layer_of(name: str, num_experts: int, **options) -> vr.MoEMlp:
    if name != "soft":
        options |= LOSSES
    if name.endswith("token_choice"):
        options |= {"top_k": min(2, num_experts), "batch_priority": True}
    return vr.MoEMlp(6, 8, num_experts=num_experts, router=name, **options)


def constant_image() -> torch.Tensor:
    return torch.full((2, 9, 6), 0.3)


DEGENERATE = {
    # The number of experts, the tokens, the mask, and the factor of the router's parameters.
    "zero logits": (4, torch.zeros(2, 9, 6), None, 1.0),
    "a router of zeros": (4, torch.randn(2, 9, 6), None, 0.0),
    "a constant image": (4, constant_image(), None, 1.0),
    "one expert": (1, torch.randn(2, 9, 6), None, 1.0),
    "one token": (4, torch.randn(2, 1, 6), None, 1.0),
    "no token": (4, torch.zeros(2, 0, 6), None, 1.0),
    "no image": (4, torch.zeros(0, 9, 6), None, 1.0),
    "all tokens masked": (4, torch.randn(2, 9, 6), torch.zeros(2, 9, dtype=torch.bool), 1.0),
    "one image masked": (4, torch.randn(2, 9, 6), torch.tensor([[True], [False]]).expand(2, 9), 1.0),
    "more experts than tokens": (12, torch.randn(2, 3, 6), None, 1.0),
    "one-hot gates": (4, torch.randn(2, 9, 6), None, 1e4),
    "gates beyond float32's exp": (4, torch.randn(2, 9, 6), None, 1e20),
    "huge tokens": (4, torch.randn(2, 9, 6) * 1e12, None, 1.0),
    "tiny tokens": (4, torch.randn(2, 9, 6) * 1e-30, None, 1.0),
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_are_finite(name, options, case):
    num_experts, x, mask, factor = DEGENERATE[case]
    for noise in (False, True):
        layer = layer_of(name, num_experts, **options)
        if not noise and hasattr(layer.router, "noise_std"):
            layer.router.noise_std = 0.0
        with torch.no_grad():
            for parameter in layer.router.parameters():
                parameter.mul_(factor)
        x = x.detach().clone().requires_grad_()
        y = layer(x, mask)
        loss = y.mean() if y.numel() else y.sum()
        (loss + vr.aux_loss(layer)).backward()
        assert y.isfinite().all()
        assert vr.aux_loss(layer).isfinite()
        for gradient in (x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)):
            assert gradient.isfinite().all(), case


def train(name: str, dtype: torch.dtype, steps: int) -> tuple[torch.Tensor, int]:
    """Returns losses of a layer that learns the classes of 8 images, and how many steps GradScaler skipped."""
    torch.manual_seed(0)
    moe = {} if name == "soft" else {"group_size": 4, **LOSSES}
    layer, head = vr.MoEMlp(8, 8, num_experts=3, router=name, **moe), torch.nn.Linear(8, 4)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, 3e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    images, labels = torch.randn(8, 6, 8), torch.arange(8) % 4
    losses, skipped = [], 0
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = head((images + layer(images)).mean(1))
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        scaler.scale(loss + vr.aux_loss(layer)).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert all(parameter.isfinite().all() for parameter in parameters)
    return torch.stack(losses), skipped


@pytest.mark.parametrize("name", vr.ROUTERS)
def test_16_bits_train_as_32_bits_do(name):
    wanted, _ = train(name, torch.float32, 500)
    assert wanted[-1] < 0.1 * wanted[0]
    for dtype in (torch.bfloat16, torch.float16):
        losses, skipped = train(name, dtype, 500)
        assert losses.isfinite().all()
        assert losses[100:].max() < losses[0], dtype
        assert losses[-1] < 0.1 * losses[0], dtype
        assert skipped <= 5  # GradScaler lowers its initial factor after an overflow of a gradient


@pytest.mark.parametrize("rate", [1e10, 1e30, 3e38])
@pytest.mark.parametrize("name", vr.ROUTERS)
def test_an_extreme_learning_rate_ends_with_an_error(name, rate):
    moe = {} if name == "soft" else {"group_size": 4}
    model = vit_moe(4, 2, 1, 4, 8, 1, 1, 2.0, router=name, num_experts=4, moe_blocks=[0], **moe)
    images, labels = torch.randn(16, 1, 4, 4), torch.arange(16) % 4
    optimisation = Optimisation(learning_rate=rate, schedule="constant", warmup=0.0, weight_decay=0.0, max_skipped=3)
    trainer = Trainer(model.train(), optimisation, 12)
    with pytest.raises(TrainingError, match=r"not finite in the last 3 steps.*A smaller learning_rate"):
        for _ in range(12):
            trainer(images, labels)
            trainer.check(images)
