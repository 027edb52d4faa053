"""evaluate: a model by name on data by name, its files and its refusals."""

import csv
import io
import json
import re

import pytest
import timm
import torch
from made import picture_folder
from rich.console import Console
from torch import nn

from vmoe_routers.checkpoints import from_pretrained, save_pretrained
from vmoe_routers.models import vit_moe
from vmoe_routers.options import OptionError
from vmoe_routers.training import evaluate_model, open_data
from vmoe_routers.training.evaluate import evaluate
from vmoe_routers.training.evaluation import Evaluation
from vmoe_routers.training.subject import open_subject
from vmoe_routers.training.throughput import Throughput

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder, classes=10, channels=1, size=8):
    torch.manual_seed(0)
    options = {"embed_dim": 8, "depth": 2, "num_heads": 2, "num_experts": 4, "group_size": 4}
    model = vit_moe(size, 2, channels, classes, router="softmax_token_choice", **options)
    nn.init.normal_(model.head.weight)
    save_pretrained(model, folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("trained") / "model")


def run(model, data, output, **options):
    """Returns the result and the printed text."""
    text = io.StringIO()
    options = {"workers": 0, "device": "cpu", **options}
    return evaluate(model, data, output=output, console=Console(file=text, width=200), **options), text.getvalue()


def test_digits(model, tmp_path):
    found, text = run(model, "digits", tmp_path / "made" / "by it", batch_size=100)
    test = open_data("digits").test
    batches = zip((test.images * 2 - 1).split(100), test.labels.split(100))
    wanted = evaluate_model(from_pretrained(model), batches, 10)
    assert isinstance(found, Evaluation) and found.images == 360
    assert (found.top1, found.classes) == (wanted.top1, wanted.classes) and found.loss == pytest.approx(wanted.loss)
    assert "on 360 test images of digits" in text and f"{wanted.top1:.4f}" in text and "blocks.1.mlp" in text
    assert re.search(r"MoE layer +slots used +dropped +load cv +entropy +dead experts", text)
    assert "input: 1 x 8 x 8, normalization inception, crop 1 (default)" in text

    record = json.loads((tmp_path / "made" / "by it" / "evaluation.json").read_text())
    assert (record["top1"], record["model"], record["data"]) == (found.top1, model, "digits") and record["machine"]
    assert record["layers"] == found.layers and record["unreadable"] == 0
    with (tmp_path / "made" / "by it" / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [row["class"] for row in record["classes"]] == [*"0123456789"]
    assert [float(row["top1"]) for row in rows] == [row["top1"] for row in found.classes]
    never = [row for row, wanted in zip(rows, found.classes) if not wanted["predicted"]]
    assert never and all(row["precision"] == "" for row in never)


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    model, folder = saved(tmp_path / "model", classes=2, channels=3), picture_folder(tmp_path / "photos", test_count=5)
    next((folder / "val" / "bee").iterdir()).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bee.*cannot be read"):
        run(model, str(folder), tmp_path)
    found, text = run(model, str(folder), tmp_path, bad_images="skip", batch_size=2)
    assert found.images == sum(row["images"] for row in found.classes) == 4
    assert "4 test images of photos; unreadable images left out: 1" in text


def test_the_input_is_that_of_the_training(model, tmp_path):
    folder = tmp_path / "run" / "model"
    save_pretrained(from_pretrained(model), folder)
    (tmp_path / "run" / "settings.yaml").write_text("normalization: none\ncrop_pct: 0.5\ninterpolation: bicubic\n")
    subject = open_subject(str(folder), "digits")
    options = subject.transform.augmentation
    assert (options.normalization, options.crop_pct, options.interpolation) == ("none", 0.5, "bicubic")
    assert "settings.yaml" in str(subject) and subject.input()["crop_pct"] == 0.5
    subject = open_subject(str(folder), "digits", crop_pct=1.0, normalization="clip")
    options = subject.transform.augmentation
    assert (options.normalization, options.crop_pct, options.interpolation) == ("clip", 1.0, "bicubic")
    assert "settings.yaml, and options" in str(subject)


def test_the_input_of_timms_weights_is_timms(monkeypatch):
    made = timm.create_model("test_vit", num_classes=10)
    monkeypatch.setattr("vmoe_routers.training.subject.load_model", lambda *_, **options: made)
    subject = open_subject("test_vit", "digits", pretrained=True)
    config, options = made.pretrained_cfg, subject.transform.augmentation
    assert (options.image_size, options.crop_pct) == (160, config["crop_pct"])
    assert torch.equal(subject.transform.mean.flatten(), torch.tensor(config["mean"]))
    made.pretrained_cfg["mean"] = (0.1, 0.2, 0.3)
    with pytest.raises(OptionError, match=r"pixels of mean \(0.1, 0.2, 0.3\)"):
        open_subject("test_vit", "digits", pretrained=True)


def test_options_of_the_model(model):
    """Evaluates colour models on grey images, at another size, with another capacity."""
    subject = open_subject("test_resnet", "digits", model_args={"num_classes": 10})
    assert subject.transform.channels == 3 and subject.transform.augmentation.image_size == 160
    subject = open_subject(model, "digits", image_size=12, model_args={"capacity_factor": 3.0})
    assert subject.model.blocks[1].mlp.router.capacity_factor == 3 and not subject.model.training
    assert subject.transform.augmentation.image_size == subject.model.patch_embed.img_size[0] == 12


def test_benchmark(model, tmp_path):
    found, text = run(model, "nowhere", tmp_path, benchmark=True, batch_size=3, dtype="bfloat16")
    assert isinstance(found, Throughput)
    assert (found.batch_size, found.image_shape, found.dtype) == (3, (1, 8, 8), "bfloat16")
    middle = sum(found.milliseconds[4:6]) / 2
    assert found.milliseconds == sorted(found.milliseconds) and len(found.milliseconds) == 10
    assert found.images_per_second == pytest.approx(3000 / middle)
    assert "batches of 3 images, 1 x 8 x 8, bfloat16, on" in text and "1 threads" in found.device
    record = json.loads((tmp_path / "throughput.json").read_text())
    assert record["images_per_second"] == found.images_per_second and record["machine"]


@pytest.mark.parametrize(("options", "words"), [
    ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
    ({"model": ""}, "model must not be empty"),
    ({"model": "nope"}, "model 'nope' is no folder"),
    ({"model": "test_vit"}, "model 'test_vit' has 1000 classes, data 'digits' has 10"),
    ({"model": "test_vit", "model_args": {"img_size": (160, 80)}}, "images of 160 x 80 pixels, wanted a square"),
    ({"model": "mixer_s32_224", "model_args": {"stem_norm": 1}}, "model 'mixer_s32_224'"),
    ({"normalization": "mean"}, "normalization must be one of"),
    ({"crop_pct": 2.0}, "crop_pct must be in [0.1, 1], got 2.0"),
    ({"data": "nowhere"}, "no folder 'nowhere'"),
    ({"device": "tpu"}, "device must be 'auto', 'cpu' or 'cuda', got 'tpu'"),
])  # fmt: skip
def test_refusals(model, tmp_path, options, words):
    with pytest.raises(ValueError) as caught:
        run(**{"model": model, "data": "digits", "output": tmp_path / "out", **options})
    assert words in str(caught.value) and not (tmp_path / "out").exists()
