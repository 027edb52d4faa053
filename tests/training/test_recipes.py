"""Recipes: every recipe trains on a folder of pictures, with a narrow model, and its model can be loaded."""

import csv
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from tests.training.made import picture_folder
from vmoe_routers import MoEMlp
from vmoe_routers.checkpoints import from_pretrained, save_pretrained
from vmoe_routers.models import vit_moe
from vmoe_routers.training import RECIPES, train

pytestmark = pytest.mark.usefixtures("one_thread")

MOE_BLOCKS = {  # B/16 and S/16 have 12 blocks, S/32 has 8
    "digits": [2, 3],
    "small": [3, 4, 5],
    "photos": [6, 7, 8, 9, 10, 11],
    "finetune": [6, 7, 8, 9, 10, 11],
    "vmoe_b16_imagenet21k": [1, 3, 5, 7, 9, 11],
    "vmoe_s32_ilsvrc2012": [5, 7],
    "vmoe_finetune_ilsvrc2012": [1],  # of the model that the test makes
    "soft_moe_b16": [6, 7, 8, 9, 10, 11],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a folder with pictures and a trained model."""
    folder = picture_folder(tmp_path_factory.mktemp("made"), count=16, test_count=4)
    model = vit_moe(16, 8, 3, 5, 16, 2, 2, router="softmax_token_choice", num_experts=4, group_size=8)
    save_pretrained(model, folder / "model")
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_train(recipe, made, tmp_path):
    settings = RECIPES[recipe]()
    changes = {"model": str(made / "model")}
    if settings.model:
        changes = {"model_args": {**settings.model_args, "embed_dim": 16, "num_heads": 2}, "num_experts": 4}
    changes |= {"data": str(made), "output": tmp_path, "pretrained": False, "image_size": 32}
    changes |= {"batch_size": 8, "epochs": 1, "workers": 0, "log_every": 1, "warmup": 0.5, "cooldown": 0.0}
    folder = train(replace(settings, **changes), console=Console(quiet=True))
    with open(tmp_path / "log.csv", newline="") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file) if row["skipped_steps"] == "0"]
    assert len(losses) == 2
    if settings.head_bias is not None:  # the sigmoid loss of a head whose kernel is 0
        assert losses[0] == pytest.approx(-settings.head_bias, rel=0.01)
    model = from_pretrained(folder).eval()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEMlp)}
    assert list(layers) == [f"blocks.{number}.mlp" for number in MOE_BLOCKS[recipe]]
    assert model(torch.zeros(8, 3, 32, 32)).shape == (8, 2)
