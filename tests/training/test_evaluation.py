"""evaluate_model: against numpy, with padding, and on two processes."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import vmoe_routers as vr
from vmoe_routers.models import vit_moe
from vmoe_routers.training import evaluate_model

pytestmark = pytest.mark.usefixtures("one_thread")


class Linear(nn.Module):
    """A classifier that keeps the batches that it saw."""

    def __init__(self, classes=7):
        super().__init__()
        self.head = nn.Linear(16, classes, bias=False)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.head(x.flatten(1)) * 3


class Given(nn.Module):
    """A model whose images are the logits."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x + self.parameter


def data(count, classes=7):
    return torch.randn(count, 1, 4, 4), torch.randint(classes, (count,))


def batches(images, labels, size):
    return zip(images.split(size), labels.split(size))


def tiny(router):
    options = {} if router is None else {"num_experts": 4, "group_size": 1 if router == "soft" else 2}
    model = vit_moe(4, 2, 1, 3, embed_dim=8, depth=2, num_heads=2, router=router, **options)
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("size", [7, 64, 400])
def test_against_numpy(size):
    model, (images, labels) = Linear(), data(300)
    found = evaluate_model(model, batches(images, labels, size), 7)
    assert torch.equal(torch.cat(model.seen), images) and max(map(len, model.seen)) <= size

    logits, y = (model.head(images.flatten(1)) * 3).double().detach().numpy(), labels.numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    order = np.argsort(-logits, axis=1)
    right, in_five, loss = order[:, 0] == y, (order[:, :5] == y[:, None]).any(1), -np.log(p[np.arange(300), y])
    assert found.images == 300 and found.images_per_second > 0 and found.layers == {}
    wanted = [right.mean(), in_five.mean(), loss.mean()]
    assert [found.top1, found.top5, found.loss] == pytest.approx(wanted, rel=1e-5)
    assert 0 < found.top1 < found.top5 < 1
    error, confidence = 0.0, p.max(1)
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert found.calibration_error == pytest.approx(error, rel=1e-5) and error > 0.01
    for label, row in enumerate(found.classes):
        of_class, predicted = y == label, order[:, 0] == label
        assert (row["images"], row["predicted"]) == (of_class.sum(), predicted.sum())
        wanted = [right[of_class].mean(), in_five[of_class].mean(), loss[of_class].mean(), right[predicted].mean()]
        assert [row[name] for name in ("top1", "top5", "loss", "precision")] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
def test_padding_and_batches_do_not_change_the_result(router):
    """Groups have two images, and the last image is a group alone. Padding forms separate groups."""
    model, (images, labels) = tiny(router), data(7, 3)
    wanted = evaluate_model(model, batches(images, labels, 4), 3)
    in_other_batches = evaluate_model(model, batches(images, labels, 6), 3)
    padding = torch.full((4, 1, 4, 4), 9.0), torch.tensor([0, 1, 99, -1]), torch.zeros(4, dtype=torch.bool)
    whole = torch.ones(6, dtype=torch.bool), torch.ones(1, dtype=torch.bool)
    parts = [(images[:6], labels[:6], whole[0]), (images[6:], labels[6:], whole[1]), padding]
    padded = evaluate_model(model, parts, 3)
    for found in (in_other_batches, padded):
        assert found.images == wanted.images == 7 and math.isfinite(wanted.loss)
        for name in ("top1", "top5", "loss", "calibration_error"):
            assert getattr(found, name) == pytest.approx(getattr(wanted, name), rel=1e-5)
    assert padded.classes == in_other_batches.classes
    assert len(wanted.layers) == (router is not None)
    for name, layer in padded.layers.items():
        assert layer["load"] == pytest.approx(wanted.layers[name]["load"], rel=1e-5)


def test_ties_and_nan():
    nan, inf = math.nan, math.inf
    logits = torch.tensor([
        [1.0, 1, 0, 0, 0, 0, 0], [1.0, 1, 0, 0, 0, 0, 0], [nan] * 7, [5, nan, 0, 0, 0, 0, 0], [inf, 0, 0, 0, 0, 0, 0],
        [0.0] * 7, [0.0] * 7,
    ])  # fmt: skip
    labels = torch.tensor([0, 1, 2, 0, 0, 4, 5])
    found = evaluate_model(Given(), [(logits, labels)], 7)
    by_label = [found.classes[label] for label in range(7)]
    assert [row["images"] for row in by_label] == [3, 1, 1, 0, 1, 1, 0]
    assert [row["top1"] for row in by_label] == [2 / 3, 0, 0, None, 0, 0, None]
    assert [row["top5"] for row in by_label] == [1, 1, 0, None, 1, 0, None]
    assert math.isnan(found.loss) and math.isnan(found.calibration_error)


def test_the_mode_of_every_module_is_restored():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.BatchNorm1d(16), nn.Linear(16, 3))
    model[2].eval()
    images, labels = data(6, 3)
    first, second = (evaluate_model(model, batches(images, labels, 6), 3).loss for _ in range(2))
    assert first == second and model.training and [module.training for module in model] == [True, True, False, True]
    with pytest.raises(ValueError, match="no images"):
        evaluate_model(model.eval(), [], 3)
    assert not any(module.training for module in model.modules())


def test_refusals():
    images, labels = data(6, 3)
    model = Linear(3).train()
    with pytest.raises(ValueError, match=r"map 6 images to logits \[6, 4\], got \[6, 3\]"):
        evaluate_model(model, [(images, labels)], 4)
    assert model.training
    with pytest.raises(ValueError, match=r"2 labels are not in \[0, 3\)"):
        evaluate_model(model, [(images, torch.tensor([0, 3, -1, 2, 1, 0]))], 3)
    with pytest.raises(ValueError, match="there are no images"):
        evaluate_model(model, [(images, labels, torch.zeros(6, dtype=torch.bool))], 3)


def test_logits_may_be_an_attribute_of_the_output():
    class Wrapped(Linear):
        def forward(self, x):
            return SimpleNamespace(logits=super().forward(x))

    images, labels = data(6, 3)
    model = Wrapped(3)
    wanted = nn.functional.cross_entropy(model(images).logits, labels)
    assert evaluate_model(model, [(images, labels)], 3).loss == pytest.approx(float(wanted.detach()))


def test_images_take_the_dtype_of_the_model():
    images, labels = data(6, 3)
    model = Linear(3).bfloat16()
    assert evaluate_model(model, [(images, labels)], 3).images == 6 and model.seen[0].dtype == torch.bfloat16


def test_the_sums_of_processes_are_added_once(monkeypatch):
    model, (images, labels) = tiny("soft"), data(9, 3)
    wanted = evaluate_model(model, batches(images, labels, 3), 3)
    rest, reduced = [], []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", rest.append)
    evaluate_model(model, batches(images[5:], labels[5:], 2), 3)
    monkeypatch.setattr(dist, "all_reduce", lambda x: reduced.append(x.add_(rest[0])))
    found = evaluate_model(model, batches(images[:5], labels[:5], 3), 3)
    assert len(reduced) == len(rest) == 1 and found.images == 9
    assert found.loss == pytest.approx(wanted.loss, rel=1e-6) and found.top1 == wanted.top1
    assert found.layers["blocks.1.mlp"]["load"] == pytest.approx(wanted.layers["blocks.1.mlp"]["load"], rel=1e-6)
