"""Vision transformers of Hugging Face transformers, upcycled: outputs, masks, gradients, save and load."""

import copy
import inspect
import json

import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers.checkpoints import CheckpointError, from_pretrained, save_pretrained
from vmoe_routers.models import upcycle

transformers = pytest.importorskip("transformers", "5.10", reason="needs transformers 5.10: make compat")

SIZES = {"image_size": 12, "patch_size": 4, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 24}
HIDDEN = {"intermediate_size": 48}
VIT = (transformers.ViTForImageClassification, transformers.ViTConfig, {**HIDDEN, "num_labels": 5})
MODELS = {
    "vit": VIT,
    "vit, tanh": (*VIT[:2], {**VIT[2], "hidden_act": "gelu_pytorch_tanh"}),
    "vit, eager": (*VIT[:2], {**VIT[2], "attn_implementation": "eager"}),
    "deit": (
        transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig, {**HIDDEN, "num_labels": 5},
    ),
    "dinov2": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config, {"mlp_ratio": 2, "num_labels": 5}),
    "dinov2, swiglu": (transformers.Dinov2Model, transformers.Dinov2Config, {"mlp_ratio": 2, "use_swiglu_ffn": True}),
    "dinov2, registers": (
        transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig, {"mlp_ratio": 2},
    ),
    "dinov3": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig, {**HIDDEN, "num_register_tokens": 2}),
    "dinov3, gated": (transformers.DINOv3ViTModel, transformers.DINOv3ViTConfig, {**HIDDEN, "use_gated_mlp": True}),
    "siglip": (transformers.SiglipVisionModel, transformers.SiglipVisionConfig, HIDDEN),
    "clip": (transformers.CLIPVisionModelWithProjection, transformers.CLIPVisionConfig, HIDDEN),
}  # fmt: skip
WHOLE = {"router": "softmax_token_choice", "num_experts": 4, "top_k": 2, "capacity_factor": 4.0, "renormalize": True}


def make(kind):
    model, config, options = MODELS[kind]
    torch.manual_seed(0)
    model = model(config(**{**SIZES, **options})).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def output(model, images):
    return model(images).to_tuple()[0]


@pytest.mark.parametrize("kind", MODELS)
def test_starts_where_the_dense_model_was(kind):
    model, images = make(kind), torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        wanted = output(model, images)
        sparse = upcycle(copy.deepcopy(model), blocks=[0, 1], **WHOLE)
        torch.testing.assert_close(output(sparse, images), wanted, rtol=0, atol=1e-5)
    layers = [module for module in sparse.modules() if isinstance(module, vr.MoEMlp)]
    assert len(layers) == 2
    if kind in ("vit", "vit, tanh"):  # the kernels compute the GELU of transformers
        assert type(layers[0].experts.act) is nn.GELU
    output(sparse.train(), images).sum().backward()
    assert all(layer.router.weight.grad is not None and layer.experts.w1.grad.any() for layer in layers)
    for layer in layers:
        layer.experts.w2.data.zero_()
    assert not torch.allclose(output(sparse.eval(), images), wanted, rtol=0, atol=1e-3)


def test_its_own_files(tmp_path):
    """save_pretrained of transformers keeps all tensors; its from_pretrained makes the dense model."""
    sparse, images = upcycle(make("vit"), **WHOLE), torch.randn(2, 3, 12, 12)
    sparse.save_pretrained(tmp_path, save_original_format=False)
    config = transformers.ViTConfig.from_pretrained(tmp_path)
    loaded = upcycle(transformers.ViTForImageClassification(config), **WHOLE).eval()
    from safetensors.torch import load_file

    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(output(loaded, images), output(sparse, images))


@pytest.mark.parametrize("kind", MODELS)
def test_folders(kind, tmp_path):
    sparse, images = upcycle(make(kind), **WHOLE), torch.randn(2, 3, 12, 12)
    save_pretrained(sparse, tmp_path)
    state = torch.random.get_rng_state()
    loaded = from_pretrained(tmp_path, capacity_factor=5.0)
    assert torch.equal(state, torch.random.get_rng_state())
    with torch.no_grad():
        torch.testing.assert_close(output(loaded, images), output(sparse, images), rtol=0, atol=1e-6)
    (layer,) = [module for module in loaded.modules() if isinstance(module, vr.MoEMlp)]
    assert layer.router.capacity_factor == 5.0


@pytest.mark.parametrize(("changes", "message"), [
    ({"model": "pipeline"}, "'pipeline' of transformers is not one of the models vit, "),
    ({"model": "DetrForObjectDetection"}, "'DetrForObjectDetection' of transformers is not one of the models"),
    ({"arguments": {"attn_implementation": "user/code"}}, "argument 'attn_implementation', which is not loaded"),
    ({"arguments": {"vision_config": {"_attn_implementation": "user/code"}}}, "argument '_attn_implementation'"),
    ({"arguments": {"quantization_config": {}}}, "argument 'quantization_config'"),
    ({"arguments": {"num_hidden_layers": 10**9}}, "num_hidden_layers is 1000000000, more than"),
    ({"arguments": {"hidden_size": "wide"}}, "wrong arguments of the model"),
], ids=str)  # fmt: skip
def test_refuses_folders(changes, message, tmp_path):
    save_pretrained(upcycle(make("vit"), **WHOLE), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["arguments"] |= changes
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


def test_another_model_of_transformers_is_saved_by_its_state_dict(tmp_path):
    model = transformers.ViTMSNModel(transformers.ViTMSNConfig(**SIZES, **HIDDEN))
    with pytest.raises(CheckpointError, match="save its state_dict"):
        save_pretrained(upcycle(model, **WHOLE), tmp_path)


def test_towers(tmp_path):
    config = transformers.CLIPConfig(
        text_config={**SIZES, **HIDDEN, "vocab_size": 9}, vision_config={**SIZES, **HIDDEN}, projection_dim=8
    )
    model = transformers.CLIPModel(config)
    with pytest.raises(ValueError, match=r"blocks at text_model\.encoder\.layers, vision_model\.encoder\.layers; give"):
        upcycle(model, **WHOLE)
    upcycle(model.vision_model, **WHOLE)
    assert isinstance(model.vision_model.encoder.layers[1].mlp, vr.MoEMlp)
    features = model.get_image_features(torch.randn(2, 3, 12, 12))
    assert features.to_tuple()[0].isfinite().all()
    save_pretrained(model, tmp_path)
    loaded = from_pretrained(tmp_path)
    assert isinstance(loaded.vision_model.encoder.layers[1].mlp, vr.MoEMlp)
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("kind", ["vit", "vit, eager", "dinov2"])
def test_refuses_a_mask_that_does_not_reach_the_layer(kind):
    model, images = upcycle(make(kind), **WHOLE), torch.randn(2, 3, 12, 12)
    if "attention_mask" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of the model takes no mask")
    everything = torch.ones(2, 10, dtype=torch.bool)
    model(images, attention_mask=None)
    with pytest.raises(ValueError, match="attention_mask must be None after upcycle"):
        model(images, attention_mask=everything.index_fill(1, torch.tensor([9]), False))
    inner = model.base_model.encoder if kind == "dinov2" else model.base_model
    with pytest.raises(ValueError, match="Layer: attention_mask must be None after upcycle"):
        inner.get_submodule("layer" if kind == "dinov2" else "layers")[1](torch.randn(2, 10, 24), everything)


def test_exports():
    model, images = upcycle(make("vit"), **WHOLE), torch.randn(2, 3, 12, 12)
    wanted = output(model, images)
    program = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(program(images).logits, wanted, rtol=1e-4, atol=1e-5)
