"""Images of a study: in memory or read from disk, held out, and augmented."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_runs import TINY, made_up

from vmoe_routers.study import Variant
from vmoe_routers.study.images import load_images, split
from vmoe_routers.study.recipes import RECIPES
from vmoe_routers.study.records import fingerprint, read_run, run_path, write_record
from vmoe_routers.study.runs import run
from vmoe_routers.study.timing import time_steps
from vmoe_routers.training.samples import Tensors

pytestmark = pytest.mark.usefixtures("one_thread")
SOFT = Variant("soft", 1.0)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Makes a folder with two classes of images of two sizes: 12 for training, 6 for testing."""
    path, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("ant", "bee"):
            (path / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path / part / name / f"{number}.png")
    return path


SMALL = replace(
    TINY, num_experts=2, batch_size=4, group_size=2, epochs=2, patch_size=8, image_size=16, stream=True, holdout=4
)


def test_a_folder_is_read_from_disk(folder, tmp_path):
    settings = replace(SMALL, data=str(folder), output=tmp_path)
    data, _ = load_images(settings)
    assert (data.size, data.channels, data.num_classes, data.nbytes) == (16, 3, 2, 0)
    record = run(settings, SOFT, 0, data, None)
    assert record["steps"] == 4 and 0 <= record["final"]["accuracy"] <= 1
    path = run_path(settings, fingerprint(data, None), SOFT, 0)
    write_record(path, record)
    assert read_run(path, settings, SOFT, 0, None)["final"] == record["final"]
    again = run(replace(settings, data_workers=2), SOFT, 0, data, None)
    assert again["final"] == record["final"] and again["epochs"][0]["loss"] == record["epochs"][0]["loss"]
    assert len(time_steps(settings, [SOFT], data)["step_ms"]["soft-c1"]) == 25


def test_images_in_memory_and_from_disk_have_the_same_labels_and_other_fingerprints(folder):
    settings = replace(SMALL, data=str(folder))
    streamed, memory = load_images(settings)[0], load_images(replace(settings, stream=False))[0]
    assert torch.equal(streamed.train_labels, memory.train_labels)
    assert fingerprint(streamed, None) != fingerprint(memory, None)
    assert fingerprint(streamed, None) == fingerprint(load_images(settings)[0], None)
    fewer = load_images(replace(settings, max_images=4))[0]
    assert fewer.train_labels.tolist() == [0, 0, 1, 1] and len(fewer.test) == 4


def test_held_out_images_of_a_sorted_file_are_spread_over_the_classes(folder):
    data, _ = load_images(replace(SMALL, data=str(folder)))
    trained, held_out = split(data, 4)
    assert (len(trained), len(held_out)) == (8, 4)
    assert [held_out[i][1] for i in range(4)] == [0, 0, 1, 1]
    mixed = made_up(train=24)
    trained, held_out = split(mixed, 8)
    assert torch.equal(held_out.images, mixed.train_images[-8:]) and torch.equal(
        trained.labels, mixed.train_labels[:16]
    )
    trained, curve = split(mixed, 0)
    assert isinstance(curve, Tensors) and torch.equal(curve.images, mixed.test_images)


def test_further_options_of_the_training(folder):
    options = {"hflip": 0.5, "scale": [0.5, 1.0], "mixup": 0.2, "weight_decay": 0.3, "schedule": "linear"}
    settings = replace(SMALL, data=str(folder), training=options | {"head_bias": -3.0, "loss": "sigmoid"})
    data, _ = load_images(settings)
    found = settings.augmentation(data.size)
    assert (found.hflip, found.scale, found.mixup, found.shift) == (0.5, (0.5, 1.0), 0.2, 0)
    chosen = settings.optimisation()
    assert (chosen.weight_decay, chosen.schedule, chosen.loss, chosen.learning_rate) == (0.3, "linear", "sigmoid", 2e-3)
    plain = run(replace(settings, training={}), SOFT, 0, data, None)
    assert run(settings, SOFT, 0, data, None)["epochs"] != plain["epochs"]
    paths = {run_path(replace(settings, training=of), "inputs", SOFT, 0) for of in ({}, options, {"hflip": 0.5})}
    assert len(paths) == 3


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]().device == "cuda"])
def test_large_recipes_take_steps_on_a_small_folder(folder, name):
    """Keeps the recipe's training, augmentation and kind of model, but with small sizes."""
    recipe = RECIPES[name]()
    settings = replace(
        recipe, data=str(folder), device="cpu", width=16, depth=2, heads=2, num_experts=2, batch_size=4,
        group_size=2, epochs=1, patch_size=16, image_size=32, holdout=4, data_workers=0,
        training={**recipe.training, "warmup": 0.5},  # 10,000 steps in the recipe
    )  # fmt: skip
    data, _ = load_images(settings)
    record = run(settings, Variant("softmax_expert_choice", 1.0), 0, data, None)
    assert record["steps"] == 2 and record["diverged"] is None


def test_the_documented_cost_is_the_computed_one():
    spec = importlib.util.spec_from_file_location("study_cost", ROOT / "scripts" / "study_cost.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    line = f"| {' | '.join(script.row('imagenet1k_s32'))} |"
    assert line in (ROOT / "docs" / "study.md").read_text(encoding="utf-8").splitlines()
