"""few_shot: probes on the features of a model by name."""

import io
import json
from dataclasses import asdict

import pytest
import timm
import torch
from made import picture_folder
from rich.console import Console
from torch.utils.data import DataLoader, TensorDataset

from vmoe_routers.checkpoints import from_pretrained, save_pretrained
from vmoe_routers.models import vit_moe
from vmoe_routers.training import few_shot_accuracy, open_data
from vmoe_routers.training.fewshot import Examples
from vmoe_routers.training.linear_probe import linear_probe
from vmoe_routers.training.probes import features_of, few_shot, labels_of, part_of
from vmoe_routers.training.samples import Pictures

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_pretrained(vit_moe(8, 2, 1, 3, embed_dim=16, depth=2, num_heads=2, num_experts=4, router="soft"), folder)
    return str(folder)


@pytest.fixture(scope="module")
def features(model):
    """Computes features and labels of the digits, for training and test."""
    found, data = from_pretrained(model), open_data("digits")
    with torch.no_grad():
        return [
            Examples(found.forward_head(found.forward_features(part.images * 2 - 1), pre_logits=True), part.labels)
            for part in (data.train, data.test)
        ]


def run(model, data, output, **options):
    text = io.StringIO()
    options = {"workers": 0, "device": "cpu", **options}
    return few_shot(model, data, output=output, console=Console(file=text, width=200), **options), text.getvalue()


def test_ridge_probe_is_the_studys(model, features, tmp_path):
    """The model's head has another number of classes, which has no effect."""
    results, text = run(model, "digits", tmp_path / "out", shots=(2, 10), seeds=(0, 1, 2))
    assert [(result.shots, result.seed) for result in results] == [(k, seed) for k in (2, 10) for seed in (0, 1, 2)]
    train, test = features
    for shots in (2, 10):
        mean = sum(result.accuracy for result in results if result.shots == shots) / 3
        assert mean == pytest.approx(few_shot_accuracy(*train, *test, shots=shots), abs=0.01)  # 0.003 per image
        assert f"{mean:.4f}" in text
    record = json.loads((tmp_path / "out" / "fewshot.json").read_text())
    assert record["results"] == [asdict(result) for result in results] and record["probe"] == "ridge"


def test_linear_probe(model, features, tmp_path):
    (result,), text = run(model, "digits", tmp_path, probe="linear")
    accuracy, l2 = linear_probe(*features)
    assert result.accuracy == pytest.approx(accuracy, abs=0.01) and result.l2 == l2
    assert result.shots is None and f"{result.accuracy:.4f}" in text


def test_only_drawn_images_are_read(model, tmp_path, monkeypatch):
    """The pictures have colours, and the model takes grey images. At most a thousand images are held out."""
    folder = picture_folder(tmp_path / "photos", count=30, test_count=6)
    read, get = [], Pictures.__getitem__
    monkeypatch.setattr(Pictures, "__getitem__", lambda self, index: read.append(index) or get(self, index))
    monkeypatch.setattr("vmoe_routers.training.fewshot.evenly", lambda size, most: torch.arange(3))
    results, _ = run(model, str(folder), tmp_path, shots=(2,), seeds=(0,), batch_size=4)
    assert len(results) == 1 and len(read) == 6 + 2 * 2 + 3


def test_labels_of_data_that_do_not_list_them():
    data = TensorDataset(torch.rand(5, 1, 4, 4), torch.tensor([1, 0, 2, 2, 1]))
    assert labels_of(data).tolist() == [1, 0, 2, 2, 1]
    part = part_of(data, torch.tensor([3, 0]))
    assert [int(label) for _, label in DataLoader(part, batch_size=None)] == [2, 1]


@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_features_come_before_the_head(name):
    model = timm.create_model(name, num_classes=5)
    images, labels = torch.randn(5, 3, 160, 160), torch.arange(5)
    found = features_of(model, zip(images.split(3), labels.split(3)))
    assert model.training and torch.equal(found.labels, labels) and found.features.ndim == 2
    with torch.no_grad():
        torch.testing.assert_close(model.eval().get_classifier()(found.features), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("options", "words"), [
    ({"probe": "knn"}, "probe must be ridge or linear, got 'knn'"),
    ({"shots": (5, 0)}, "shots must be at least 1, got [5, 0]"),
    ({"seeds": ()}, "seeds must be at least 0, got []"),
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"shots": (10000,)}, "10000 shots take all 1437 training images"),
    ({"data": "nowhere"}, "no folder 'nowhere'"),
])  # fmt: skip
def test_refusals(model, tmp_path, options, words):
    with pytest.raises(ValueError) as caught:
        run(**{"model": model, "data": "digits", "output": tmp_path / "out", **options})
    assert words in str(caught.value) and not (tmp_path / "out").exists()
