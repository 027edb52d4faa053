"""save_pretrained and from_pretrained of models of timm and torchvision that `upcycle` changed."""

import json

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import vmoe_routers as vr
from vmoe_routers.checkpoints import CheckpointError, from_pretrained, save_pretrained
from vmoe_routers.models import upcycle, vit_moe

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"router": "softmax_token_choice", "num_experts": 4, "top_k": 2, "blocks": [1], "renormalize": True}
TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
TORCHVISION = {
    "image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48, "dropout": 0.1,
}  # fmt: skip


def check_same(loaded, saved, size=16):
    ours, theirs = loaded.state_dict(), saved.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(loaded(images), saved(images))
    assert not loaded.training


@pytest.mark.parametrize("name", [
    "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_224", "vit_small_patch16_dinov3",
])  # fmt: skip
def test_of_timm(name, tmp_path):
    model = upcycle(timm.create_model(name, **TIMM).eval(), **OPTIONS)
    save_pretrained(model, tmp_path)
    state = torch.random.get_rng_state()
    loaded = from_pretrained(tmp_path)
    assert torch.equal(state, torch.random.get_rng_state())
    check_same(loaded, model)
    layer = from_pretrained(tmp_path, capacity_factor=3.0).blocks[1].mlp
    assert (layer.router.top_k, layer.router.renormalize, layer.router.capacity_factor) == (2, True, 3.0)
    save_pretrained(loaded, tmp_path / "again")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_what_changed_since(tmp_path):
    options = {**TIMM, "dynamic_img_size": True, "global_pool": "avg", "class_token": False}
    model = timm.create_model("vit_tiny_patch16_224", **options)
    model = upcycle(model.eval(), **OPTIONS)
    model.reset_classifier(3)
    upcycle(model, router="soft", num_experts=2, blocks=[0], group_size=1, slots_per_expert=np.int64(2))
    with pytest.raises(CheckpointError, match=r"(?s)cls_token: missing, wanted shape .1, 1, 24."):
        save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, model_args={"class_token": False})
    loaded = from_pretrained(tmp_path)
    check_same(loaded, model, 32)
    assert isinstance(loaded.blocks[0].mlp.router, vr.SoftRouter)


def test_refuses_what_would_be_lost(tmp_path):
    model = upcycle(timm.create_model("vit_tiny_patch16_224", **TIMM, drop_path_rate=0.5), **OPTIONS)
    with pytest.raises(CheckpointError, match=r"is DropPath\(drop_prob=0\.500\), and .* make Ident.* as model_args"):
        save_pretrained(model, tmp_path)
    save_pretrained(model, tmp_path, model_args={"drop_path_rate": 0.5})
    assert from_pretrained(tmp_path).blocks[1].drop_path1.drop_prob == 0.5
    with pytest.raises(CheckpointError, match="model_args are for a model of timm"):
        save_pretrained(vit_moe(16, 8, embed_dim=16, depth=2, num_heads=2), tmp_path, model_args={"depth": 2})
    own = timm.models.VisionTransformer(**TIMM)
    with pytest.raises(CheckpointError, match=r"is no model of vit_moe, timm\.create_model, torchvision or"):
        save_pretrained(upcycle(own, **OPTIONS), tmp_path)
    with pytest.raises(CheckpointError, match="VisionTransformer has no moe_config, wanted a model that vit_moe"):
        save_pretrained(timm.create_model("vit_tiny_patch16_224", **TIMM), tmp_path)


@pytest.mark.parametrize("classes", [5, 7])
def test_of_torchvision(classes, tmp_path):
    model = upcycle(torchvision.models.VisionTransformer(**TORCHVISION, num_classes=5).eval(), **OPTIONS)
    model.heads.head = nn.Linear(24, classes)
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    check_same(loaded, model)
    assert loaded.encoder.layers[1].mlp.experts.drop.p == loaded.encoder.dropout.p == 0.1


@pytest.fixture
def folder(tmp_path):
    save_pretrained(upcycle(timm.create_model("vit_tiny_patch16_224", **TIMM), **OPTIONS), tmp_path)
    return tmp_path


@pytest.mark.parametrize(("changes", "message"), [
    ({"library": "os"}, "names no model of timm, torchvision or transformers"),
    ({"model": "hf-hub:user/vit"}, "timm has no model 'hf-hub:user/vit'"),
    ({"model": "resnet18"}, "config.json: wrong arguments of the model"),
    ({"arguments": {"pretrained": True}}, "argument 'pretrained', which a file must not set"),
    ({"arguments": {"checkpoint_path": "a"}}, "argument 'checkpoint_path'"),
    ({"arguments": {"depth": 10**9}}, "depth is 1000000000, more than"),
    ({"arguments": {"embed_dim": 10**9}}, "config.json: wrong arguments of the model|not the model of"),
    ({"arguments": []}, "names no model of timm"),
    ({"replaced": 1}, "the description of the replaced layers is missing"),
    ({"replaced": [{}]}, "wrong arguments of the model"),
    ({"replaced": [{"part": "head", **OPTIONS}]}, "wrong arguments of the model"),
    ({"replaced": [{"part": "", **OPTIONS, "num_experts": 10**9}]}, "num_experts is 1000000000, more than"),
    ({"library": "torchvision", "model": "resnet18", "arguments": {}}, "torchvision's 'resnet18' is not"),
], ids=str)  # fmt: skip
def test_refuses_configurations(folder, changes, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["arguments"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)
