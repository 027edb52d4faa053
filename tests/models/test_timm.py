"""Functions of timm for its models work with MoE layers: masks, the optimizer factory, feature extraction."""

import copy
import inspect
import pickle

import pytest
import timm
import torch
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from timm.optim import create_optimizer_v2
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import vmoe_routers as vr
from vmoe_routers.models import upcycle, vit_moe

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2}
TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 5, **SIZES}
MIXTURE = {"num_experts": 4, "blocks": [0, 1]}


def drawn(model):
    """Draws all parameters, so that heads, layer scales and biases do not have their initial values."""
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def naflex(**options):
    return drawn(NaFlexVit(NaFlexVitCfg(patch_size=2, **SIZES, **options), in_chans=1, num_classes=5))


NAFLEX = {
    "avg": {"global_pool": "avg"},
    "token and registers": {"global_pool": "token", "class_token": True, "reg_tokens": 2},
    "map": {"global_pool": "map"},
    "masked keys": {"global_pool": "avg", "use_key_only_attn_mask": True},  # missing in timm's first releases
    "rope": {"global_pool": "avg", "rope_type": "axial", "attn_type": "rope"},
    "eva": {"global_pool": "avg", "attn_type": "eva", "swiglu_mlp": True, "scale_mlp_norm": True},
}


@pytest.mark.parametrize("router", ["softmax_token_choice", "softmax_expert_choice", "soft"])
@pytest.mark.parametrize("kind", NAFLEX)
def test_padded_patches_of_naflex_are_not_routed(kind, router):
    if not NAFLEX[kind].keys() <= NaFlexVitCfg.__dataclass_fields__.keys():
        pytest.skip("this timm has no such option")
    model = upcycle(naflex(**NAFLEX[kind]), router=router, **MIXTURE)
    coordinates = torch.cartesian_prod(torch.arange(3), torch.arange(4)).expand(2, -1, -1)
    patches, valid = torch.randn(2, 12, 4), torch.ones(2, 12, dtype=torch.bool)
    more = 16
    padded = {
        "patches": torch.cat([patches, torch.randn(2, more, 4)], 1),
        "patch_coord": torch.cat([coordinates, coordinates.new_zeros(2, more, 2)], 1),
        "patch_valid": torch.cat([valid, valid.new_zeros(2, more)], 1),
    }
    with vr.inspect.record(model) as trace:
        model(padded)
    for routing in trace.routings["blocks.0.mlp"]:
        assert not routing.combine_tensor()[:, -more:].any()
    if router != "soft":  # otherwise the number of slots would depend on the padding
        for block in model.blocks:
            block.mlp.router.slots = lambda tokens: 3
    wanted = model({"patches": patches, "patch_coord": coordinates, "patch_valid": valid})
    torch.testing.assert_close(model(padded), wanted, rtol=1e-4, atol=1e-4)


def vit(**options):
    return VisionTransformer(**TINY, **options)


def eva(**options):
    return Eva(**TINY, **options)


MASKED = {
    "vit": vit,
    "deit distilled": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TINY),
    "registers and layer scale": lambda: vit(reg_tokens=3, init_values=0.1),
    "post norm": lambda: vit(block_fn=ResPostBlock),
    "eva": eva,
    "eva, layer scale": lambda: eva(init_values=0.1, use_rot_pos_emb=True, qkv_fused=False),
    "eva, post norm": lambda: eva(use_post_norm=True),
    "eva, swiglu": lambda: eva(swiglu_mlp=True, scale_mlp=True, num_reg_tokens=2),
}


@pytest.mark.parametrize("kind", MASKED)
def test_a_mask_for_attention_masks_routing(kind):
    """Hidden tokens reach no expert, for every form of the mask. A mask that hides no token changes no routing."""
    torch.manual_seed(0)
    dense = drawn(MASKED[kind]())
    if "attn_mask" not in inspect.signature(dense.forward_features).parameters:
        pytest.skip("this timm has no mask here")
    model = upcycle(copy.deepcopy(dense), router="softmax_expert_choice", **MIXTURE)
    assert isinstance(model.blocks[0], type(dense.blocks[0]))
    x = torch.randn(2, 1, 8, 8)
    tokens = 16 + dense.num_prefix_tokens
    real = torch.arange(tokens) < tokens - 6
    causal, pairs = torch.ones(tokens, tokens, dtype=torch.bool).tril(), real[:, None] & real
    forms = {
        "keys": real.expand(2, 1, 1, tokens),
        "pairs": torch.zeros(2, 1, tokens, tokens).masked_fill(~pairs, torch.finfo(torch.float32).min),
        "scores": torch.zeros(tokens, tokens).masked_fill(~real, torch.finfo(torch.float32).min),
        "infinite": torch.zeros(1, 1, 1, tokens).masked_fill(~real, -torch.inf),
    }
    for form, mask in forms.items():
        with vr.inspect.record(model) as trace:
            features = model.forward_features(x, attn_mask=mask)
        for name in ("blocks.0.mlp", "blocks.1.mlp"):
            assert torch.equal(trace.routings[name][0].mask, real.expand(2, -1)), form
        copied = pickle.loads(pickle.dumps(model))
        assert torch.equal(copied.forward_features(x, attn_mask=mask), features)
    with vr.inspect.record(model) as trace:
        model.forward_features(x, attn_mask=causal)
    assert trace.routings["blocks.0.mlp"][0].mask.all()
    # With slots for every token, masked attention and experts give the outputs of the dense model.
    whole = {"renormalize": True, "capacity_factor": 4.0}
    whole = upcycle(copy.deepcopy(dense), router="softmax_expert_choice", **whole, **MIXTURE)
    for mask in (None, causal, forms["keys"]):
        wanted = dense.forward_features(x, attn_mask=mask)[..., : tokens - 6, :]
        torch.testing.assert_close(whole.forward_features(x, attn_mask=mask)[..., : tokens - 6, :], wanted)


def test_its_own_models_take_the_mask_too():
    dense = vit_moe(8, 2, 1, **SIZES, router=None, global_pool="token")
    for model in (dense, upcycle(copy.deepcopy(dense), router="soft", **MIXTURE)):
        mask = (torch.arange(17) < 12).expand(2, 1, 1, 17)
        x = torch.randn(2, 1, 8, 8)
        torch.testing.assert_close(
            model.forward_features(x, attn_mask=mask)[:, :12],
            model.forward_features(x, mask=mask[:, 0, 0, 1:])[:, :12],
        )


class OtherBlock(Block):
    """A block that a user could write: its forward may do anything with the mask."""


def test_blocks_of_another_kind_refuse_masks():
    model = upcycle(vit(block_fn=OtherBlock), router="soft", **MIXTURE)
    x = torch.randn(2, 1, 8, 8)
    model(x)
    for call in (lambda mask: model(x, attn_mask=mask), lambda mask: model.blocks[0](torch.randn(2, 17, 16), mask)):
        with pytest.raises(TypeError, match="attn_mask came to a OtherBlock"):
            call(torch.ones(17, 17, dtype=torch.bool))


def blocks_alone():
    model = nn.Module()
    model.blocks = nn.ModuleList(vit().blocks)
    return model


MIXTURES = {
    "gated": lambda: vit_moe(8, 2, 1, **SIZES, moe_blocks="every_1", num_experts=3, glu=True),
    "soft": lambda: vit_moe(8, 2, 1, **SIZES, moe_blocks="every_1", num_experts=3, global_pool="map"),
    "upcycled": lambda: upcycle(vit(reg_tokens=2), router="softmax_token_choice", **MIXTURE),
    "upcycled, gated, normed": lambda: upcycle(eva(swiglu_mlp=True, scale_mlp=True), router="soft", **MIXTURE),
    "upcycled naflex": lambda: upcycle(naflex(), router="soft", **MIXTURE),
    "upcycled twice": lambda: upcycle(
        upcycle(vit(), router="soft", num_experts=2, blocks=[0]), router="soft", num_experts=2, blocks=[1]
    ),
    "no method of its own": lambda: upcycle(blocks_alone(), router="soft", **MIXTURE),
}


@pytest.mark.parametrize("layer_decay", [None, 0.7])
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_optimizer_of_timm_decays_weights_alone(kind, layer_decay):
    made = MIXTURES[kind]()
    for model in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=layer_decay)
        decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        seen = set()
        for path, parameter in model.named_parameters():
            if ".mlp." in path and path.startswith("blocks."):
                last = path.rpartition(".")[2]
                wanted = 0.1 if last in ("w1", "w2", "phi") or path.endswith("logits.weight") else 0.0
                assert decay[id(parameter)] == wanted, path
                seen.add(last)
        assert {"w1", "b1", "w2", "b2"} < seen
    own = type(made).no_weight_decay(made) if hasattr(type(made), "no_weight_decay") else set()
    assert own <= made.no_weight_decay()


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_siglip_224"])
def test_upcycled_models_are_drawn_after_the_meta_device(name):
    with torch.device("meta"):
        model = timm.create_model(name, img_size=28 if "14" in name else 32, num_classes=5, **SIZES)
        upcycle(model, router="soft", num_experts=2, blocks=[0, 1])
    if "needs_reset" not in inspect.signature(getattr(model, "init_weights", len)).parameters:
        pytest.skip("this timm does not draw the whole model")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    model.init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    first, second = (block.mlp.experts.w2.std().item() for block in model.blocks)
    scaled = 1 if "siglip" in name else 2**0.5  # BEiT and EVA divide by the root of twice the depth
    assert first / second == pytest.approx(scaled, rel=0.1)


FAMILIES = {
    "beit_base_patch16_224": {"img_size": 32, **SIZES},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, **SIZES},
    "hiera_tiny_224": {"img_size": (64, 64), "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "samvit_base_patch16": {"img_size": 32, **SIZES},
    "vit_base_patch16_siglip_224": {"img_size": 32, **SIZES},
    "vit_relpos_small_patch16_224": {"img_size": 32, **SIZES},
    "vit_srelpos_small_patch16_224": {"img_size": 32, **SIZES},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_start_where_they_were(name):
    dense = drawn(timm.create_model(name, num_classes=5, **FAMILIES[name]))
    whole = {"num_experts": 2, "capacity_factor": 2.0, "renormalize": True, "blocks": "last_1"}
    model = upcycle(copy.deepcopy(dense), router="softmax_expert_choice", **whole)
    side = 64 if "hiera" in name else 32
    x = torch.randn(2, 3, side, side)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1)
    (plain,) = (group["params"] for group in optimizer.param_groups if group["weight_decay"] == 0)
    experts = next(module for module in model.modules() if isinstance(module, vr.Experts))
    assert any(parameter is experts.b1 for parameter in plain)


@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
@pytest.mark.parametrize("global_pool", ["avg", "token", "map"])
def test_feature_extractor_of_torchvision(router, global_pool):
    options = {} if router is None else {"num_experts": 2, "noise_std": 0.0}
    model = vit_moe(8, 2, 1, 5, **SIZES, router=router, global_pool=global_pool, **options)
    nn.init.normal_(model.head.weight)
    extractor = create_feature_extractor(model, {"blocks.1.mlp": "moe", "head": "logits"})
    x, mask = torch.randn(2, 1, 8, 8), torch.rand(2, 16) > 0.3
    for training in (False, True):
        model.train(training)
        extractor.train(training)
        for masked in (None, mask):
            found = extractor(x, mask=masked)
            torch.testing.assert_close(found["logits"], model(x, mask=masked))
            assert found["moe"].shape == (2, 16 + model.num_prefix_tokens, 16)


@pytest.mark.parametrize("make", [vit, eva], ids=["vit", "eva"])
def test_symbolic_trace(make):
    model = upcycle(make(), router="softmax_token_choice", importance_loss_weight=1.0, noise_std=0.0, **MIXTURE).train()
    graph = torch.fx.symbolic_trace(model)
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(graph(x), model(x))
    assert vr.aux_loss(graph) > 0
    if "attn_mask" in inspect.signature(model.forward).parameters:
        mask = (torch.arange(17) < 12).expand(2, 1, 1, 17)
        torch.testing.assert_close(graph(x, mask), model(x, mask))
    with pytest.raises(TypeError, match=r"torch\.fx cannot trace a layer alone"):
        torch.fx.symbolic_trace(model.blocks[0].mlp)
