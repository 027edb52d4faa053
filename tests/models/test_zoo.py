"""The models' names in timm, and timm's functions that work on these models."""

import pytest
import timm
import torch

import vmoe_routers as vr
from vmoe_routers.models import NAMES, MoEVisionTransformer

TINY = {"img_size": 32, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_experts": 4, "num_classes": 5}


def test_names():
    assert len(NAMES) == len(set(NAMES)) == 6 * 11
    assert set(NAMES) <= set(timm.list_models(module="zoo"))
    assert {"soft_moe_base_patch16_224", "softmax_token_choice_moe_huge_patch14_224"} <= set(NAMES)
    for name in NAMES:
        assert timm.is_model(name) and timm.get_pretrained_cfg(name).input_size == (3, 224, 224)


@pytest.mark.parametrize("name", NAMES)
def test_sizes(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_experts=2)
    router, _, rest = name.partition("_moe_")
    size, patch, _ = rest.split("_")
    width = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}[size]
    assert isinstance(model, MoEVisionTransformer) and model.num_classes == 1000
    assert model.patch_embed.patch_size == 2 * (int(patch.removeprefix("patch")),)
    layers = [block.mlp for block in model.blocks if isinstance(block.mlp, vr.MoEMlp)]
    assert len(layers) == len(model.blocks) // 2
    assert layers[0].experts.w1.shape == (2, width, 4 * width)
    if router == "soft":
        # as many slots as tokens
        assert layers[0].router.phi.shape == (width, 2, round(model.patch_embed.num_patches / 2))


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_timm_arguments_and_features(router):
    name = f"{router}_moe_tiny_patch16_224"
    # timm's training script always gives both rates
    options = {"drop_rate": 0.2, "drop_path_rate": 0.1, "qk_norm": True, "moe_blocks": "every_2", "group_size": 2}
    model = timm.create_model(name, **TINY, **options, in_chans=1).eval()
    assert model.head_drop.p == 0.2
    assert [isinstance(block.mlp, vr.MoEMlp) for block in model.blocks] == [False, True, False, True]
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 5)
    model.reset_classifier(7)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.forward_features(torch.randn(2, 1, 32, 32)).shape == (2, 4, 16)
    features = timm.create_model(name, features_only=True, **TINY)
    assert [tuple(f.shape) for f in features(torch.randn(2, 3, 32, 32))] == 3 * [(2, 16, 2, 2)]
    assert timm.data.resolve_model_data_config(model)["input_size"][1:] == (224, 224)


def test_pooling_and_slots():
    model = timm.create_model("soft_moe_tiny_patch16_224", global_pool="token", slots_per_expert=3, **TINY)
    assert model.num_prefix_tokens == 1 and model.blocks[3].mlp.router.phi.shape == (16, 4, 3)
    half = timm.create_model("soft_moe_tiny_patch16_224", capacity_factor=0.5, **{**TINY, "num_experts": 1})
    assert half.blocks[3].mlp.router.slots_per_expert == 2


def test_weights_of_a_file_and_none_of_the_name(tmp_path):
    name = "softmax_expert_choice_moe_tiny_patch16_224"
    model = timm.create_model(name, **TINY)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    overlay = {"file": str(tmp_path / "weights.pt"), "num_classes": 5, "input_size": (3, 32, 32)}
    loaded = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    # For another image size the positions are resampled. For another number of classes the head is left out.
    options = {**TINY, "img_size": 64, "num_classes": 7}
    larger = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    assert larger.pos_embed.shape == (1, 16, 16)
    assert torch.equal(larger.blocks[3].mlp.experts.w1, model.blocks[3].mlp.experts.w1)
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)
