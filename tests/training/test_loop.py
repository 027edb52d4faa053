"""The training loop: batches, learning rates, weight decay."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vmoe_routers as vr
from vmoe_routers.models import vit_moe
from vmoe_routers.training import Images, Recipe, train
from vmoe_routers.training.loop import _optimizer, _schedule, random_shift

pytestmark = pytest.mark.usefixtures("one_thread")


def data(train=20, test=11, size=4):
    """Images whose every pixel says which image it is."""
    images = torch.arange(1, train + 1).float().view(-1, 1, 1, 1).expand(-1, 1, size, size).contiguous()
    labels = torch.arange(train) % 3
    return Images("made up", images, labels, torch.randn(test, 1, size, size), torch.arange(test) % 3, 3)


class Linear(nn.Module):
    """A classifier that keeps what it saw."""

    def __init__(self, extra_draws=0):
        super().__init__()
        self.head = nn.Linear(16, 3)
        self.extra_draws = extra_draws
        self.seen = []

    def forward(self, x):
        self.seen.append(x.clone())
        torch.rand(self.extra_draws)  # as a router's noise
        return self.head(x.flatten(1) / 20)


RECIPE = Recipe(epochs=2, batch_size=8, seed=3)


def seen_by(model, recipe=RECIPE):
    train(model, data(), recipe)
    return torch.stack(model.seen)


def test_every_model_sees_the_same_images_in_the_same_order():
    first = seen_by(Linear())
    assert torch.equal(first, seen_by(Linear(extra_draws=5)))
    assert not torch.equal(first, seen_by(Linear(), replace(RECIPE, seed=4)))


def test_an_epoch_takes_every_image_at_most_once():
    seen = seen_by(Linear(), replace(RECIPE, shift=0))
    assert len(seen) == 4  # 20 images are two batches of 8
    epochs = seen[:, :, 0, 0, 0].view(2, 16).tolist()
    assert all(len(set(epoch)) == 16 for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_train_reports_and_learns():
    torch.manual_seed(0)
    model, reports = Linear(), []
    images = replace(data(), train_images=F.one_hot(torch.arange(20) % 3, 16).view(-1, 1, 4, 4).float() * 20)
    assert train(model, images, replace(RECIPE, epochs=20, learning_rate=0.1, shift=0), reports.append) == 40
    assert [report.epoch for report in reports] == list(range(1, 21))
    assert 0 < reports[0].seconds < reports[-1].seconds
    assert reports[-1].train_loss < 0.2 < reports[0].train_loss


def test_refuses_less_than_a_batch():
    with pytest.raises(ValueError, match="20 images are less than one batch of 32"):
        train(Linear(), data(), replace(RECIPE, batch_size=32))


def tiny(router):
    torch.manual_seed(0)
    options = {} if router is None else {"num_experts": 4, "group_size": 1 if router == "soft" else 2}
    return vit_moe(4, 2, 1, 3, embed_dim=8, depth=2, num_heads=2, router=router, **options)


def test_auxiliary_losses_are_trained_on():
    """With images that say nothing, only the auxiliary losses can move the router."""
    moved = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        layer = vr.MoEMlp(
            16, 8, 3, num_experts=4, router="softmax_token_choice", importance_loss_weight=weight, load_loss_weight=0.0
        )
        layer.experts.w2.detach().zero_()
        before = layer.router.weight.detach().clone()
        model = nn.Sequential(nn.Flatten(2), layer, nn.Flatten(1))
        layer.experts.requires_grad_(False)
        train(model, replace(data(), train_images=torch.randn(20, 1, 4, 4)), replace(RECIPE, weight_decay=0.0))
        moved.append(float((layer.router.weight.detach() - before).norm()))
    assert moved[0] == 0 < moved[1]


@pytest.mark.parametrize("steps", [1, 7, 100])
def test_schedule(steps):
    recipe = Recipe(warmup=0.1)
    factors = [_schedule(recipe, steps)(step) for step in range(steps + 1)]
    warmup = max(1, round(0.1 * steps))
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert max(factors[:-1]) == 1
    for step in range(warmup, steps):
        assert factors[step] == pytest.approx(0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup)))
    assert all(later < earlier for earlier, later in zip(factors[warmup:], factors[warmup + 1 :]))
    if steps > 1:
        assert factors[-1] == pytest.approx(0, abs=1e-12)


def test_learning_rate_follows_the_schedule(monkeypatch):
    used = []
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: used.append(self.param_groups[0]["lr"]))
    train(Linear(), data(), replace(RECIPE, epochs=5, learning_rate=0.5, warmup=0.2))
    factor = _schedule(replace(RECIPE, warmup=0.2), 10)
    assert used == pytest.approx([0.5 * factor(step) for step in range(10)])


@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
def test_only_matrices_are_decayed(router):
    model = tiny(router)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, rest = _optimizer(model, Recipe(weight_decay=0.25)).param_groups
    assert decayed["weight_decay"] == 0.25 and rest["weight_decay"] == 0
    found = {names[id(parameter)] for parameter in decayed["params"]}
    others = {names[id(parameter)] for parameter in rest["params"]}
    assert found | others == set(names.values()) and not found & others
    for name in found:
        assert name.endswith(("weight", ".w1", ".w2", ".phi")) and "norm" not in name, name
    for name in others:
        assert "norm" in name or name.endswith(("bias", ".b1", ".b2", ".scale", "pos_embed")), name
    assert "patch_embed.proj.weight" in found and "pos_embed" in others


def test_norms_of_experts_are_not_decayed():
    experts = vr.Experts(2, 4, 6, 4, norm_layer=torch.nn.LayerNorm, glu=True)  # their weights are [E, F]
    decayed, _ = _optimizer(torch.nn.Sequential(experts), Recipe()).param_groups
    assert {id(parameter) for parameter in decayed["params"]} == {id(experts.w1), id(experts.w2)}


def test_random_shift():
    images = torch.arange(1, 1 + 50 * 2 * 5 * 6).float().view(50, 2, 5, 6)
    generator = torch.Generator().manual_seed(0)
    shifted = random_shift(images, 2, generator)
    assert shifted.shape == images.shape
    padded, offsets = F.pad(images, [2] * 4), set()
    for image, around in zip(shifted, padded):
        matches = [
            (i - 2, j - 2) for i in range(5) for j in range(5) if torch.equal(image, around[:, i : i + 5, j : j + 6])
        ]
        assert len(matches) == 1  # all channels by the same offset, zeros moving in
        offsets |= set(matches)
    # All rows and columns of offsets come up, the largest too.
    assert {i for i, _ in offsets} == {j for _, j in offsets} == {-2, -1, 0, 1, 2}
    assert torch.equal(shifted, random_shift(images, 2, torch.Generator().manual_seed(0)))
    assert not torch.equal(shifted, random_shift(images, 2, generator))
    assert torch.equal(random_shift(images, 0, generator), images)
