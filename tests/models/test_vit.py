"""vit_moe: shapes, placement, pooling, positions, options that reach the layers, and refused arguments."""

import runpy
import sys

import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers import models
from vmoe_routers.models import SIZES, moe_block_indices, upcycle, vit_moe

TINY = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "num_classes": 10,
    "embed_dim": 16,
    "depth": 4,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "num_experts": 4,
}


@pytest.mark.parametrize("router", ["soft", "softmax_token_choice"])
def test_misspelled_arguments_are_named(router):
    with pytest.raises(TypeError, match=r"^vit_moe: no argument .* named 'depht'; did you mean depth\?$"):
        vit_moe(8, 4, router=router, depht=2)
    with pytest.raises(TypeError, match=r"named 'capacity_facto'; did you mean capacity_factor\?$"):
        vit_moe(8, 4, router=router, capacity_facto=2)


def tiny(**options):
    return vit_moe(**{**TINY, **options})


def images(n=4, size=8, channels=1):
    return torch.randn(n, channels, size, size)


def with_a_head(model):
    """A head with weights other than 0, so that the output depends on the layers before it."""
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
@pytest.mark.parametrize(
    ("global_pool", "qk_norm", "pos_embed"),
    [("avg", False, "learned"), ("token", True, "learned"), ("token", False, "sincos"), ("map", True, "sincos")],
)
def test_trains(router, global_pool, qk_norm, pos_embed):
    model = tiny(router=router, group_size=2, global_pool=global_pool, qk_norm=qk_norm, pos_embed=pos_embed)
    logits = with_a_head(model).train()(images())
    assert logits.shape == (4, 10)
    (logits.square().mean() + vr.aux_loss(model)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    layers = [isinstance(block.mlp, vr.MoEMlp) for block in model.blocks]
    assert layers == [False, False, router is not None, router is not None]


@pytest.mark.parametrize(("depth", "rule", "wanted"), [
    (4, "last_half", (2, 3)),
    (5, "last_half", (2, 3, 4)),
    (1, "last_half", (0,)),
    (4, "every_2", (1, 3)),
    (5, "every_2", (1, 3)),
    (6, "every_3", (2, 5)),
    (3, "every_1", (0, 1, 2)),
    (8, "last_2", (6, 7)),
    (2, "last_2", (0, 1)),
    (8, [5, 7], (5, 7)),
    (8, (7, 5), (5, 7)),
    (8, range(1, 8, 2), (1, 3, 5, 7)),
])  # fmt: skip
def test_moe_block_indices(depth, rule, wanted):
    assert moe_block_indices(depth, rule) == wanted


@pytest.mark.parametrize("rule", [
    "first_half", "last_", "last_0", "last_-1", "last_5", "every_5", "every_0", "every_2 ", "", [], [4], [-1], [1, 1],
    [1.0], [True], ["1"], 2, None,
])  # fmt: skip
def test_refuses_a_placement(rule):
    with pytest.raises(ValueError, match=r"moe_block_indices: moe_blocks.*wanted"):
        moe_block_indices(4, rule)
    with pytest.raises(ValueError, match="moe_blocks"):
        tiny(moe_blocks=rule)


def test_moe_blocks_are_where_the_rule_says():
    model = tiny(moe_blocks=[0, 3])
    assert [isinstance(block.mlp, vr.MoEMlp) for block in model.blocks] == [True, False, False, True]


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_the_trunk_is_the_same_for_every_router(router):
    torch.manual_seed(5)
    dense = tiny(router=None).state_dict()
    torch.manual_seed(5)
    moe = tiny(router=router).state_dict()
    shared = dense.keys() & moe.keys()
    assert shared == {name for name in dense if not name.startswith(("blocks.2.mlp", "blocks.3.mlp"))}
    assert all(torch.equal(dense[name], moe[name]) for name in shared)


def test_initialisation():
    model = tiny(embed_dim=64, mlp_ratio=4.0, pos_embed_std=1.0, global_pool="token")
    block = model.blocks[0]
    for part in block.attn.qkv.weight.chunk(3):  # Xavier for each square kernel, not for all three together
        bound = (6 / 128) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound
    assert block.mlp.fc1.weight.abs().max() <= (6 / (64 + 256)) ** 0.5
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "b1", "b2")) or name in ("cls_token", "head.weight"):
            assert not parameter.any(), name
    assert model.pos_embed.std().item() == pytest.approx(1, abs=0.1)
    assert tiny(pos_embed_std=0.5).pos_embed.std().item() == pytest.approx(0.5, abs=0.1)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(4**-0.5, rel=0.2)
    assert all(norm.eps == 1e-6 for norm in model.modules() if isinstance(norm, nn.LayerNorm))
    assert all(act.approximate == "tanh" for act in model.modules() if isinstance(act, nn.GELU))


def test_sincos_positions_are_fixed_and_distinct():
    model = tiny(pos_embed="sincos", global_pool="token")
    table = model.pos_embed
    assert not isinstance(table, nn.Parameter) and "pos_embed" in model.state_dict()
    assert table.shape == (1, 16, 16)
    y, x = 2, 3  # sin x, cos x, sin y, cos y; the first frequency is 1
    expected = torch.tensor([x, x + torch.pi / 2, y, y + torch.pi / 2]).sin()
    torch.testing.assert_close(table[0, 4 * y + x, ::4], expected)
    assert torch.pdist(table[0]).min() > 0.1
    assert tiny(img_size=(4, 8), pos_embed="sincos").pos_embed.shape == (1, 8, 16)


def test_rectangles_and_three_channels():
    model = tiny(img_size=(4, 8), patch_size=(2, 4), in_chans=3, pos_embed="sincos")
    assert model(torch.randn(2, 3, 4, 8)).shape == (2, 10)


def test_no_head():
    assert tiny(num_classes=0)(images()).shape == (4, 16)


def test_class_token_and_its_place_in_the_table():
    assert tiny(global_pool="token").pos_embed.shape == (1, 17, 16)
    assert tiny(global_pool="avg").pos_embed.shape == (1, 16, 16)
    assert tiny(global_pool="avg").cls_token is None


def test_qk_norm_has_a_scale_and_no_bias():
    model = tiny(qk_norm=True, global_pool="map")
    norms = [
        norm for attention in (model.blocks[0].attn, model.attn_pool) for norm in (attention.q_norm, attention.k_norm)
    ]
    assert all(norm.weight.shape == (8,) and norm.bias is None for norm in norms)
    model = with_a_head(model).eval()
    x = images()
    before = model(x)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:32] *= 3  # queries and keys; the norm removes the factor
    torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("global_pool", "group_size", "slots"), [("avg", 1, 4), ("avg", 2, 8), ("token", 8, 34)])
def test_soft_by_capacity_factor_counts_the_tokens_itself(global_pool, group_size, slots):
    model = tiny(router="soft", capacity_factor=1.0, global_pool=global_pool, group_size=group_size)
    assert model.blocks[3].mlp.router.phi.shape == (16, 4, slots)
    with vr.inspect.record(model) as trace:
        model(images(8))
    assert trace.routings["blocks.3.mlp"][0].num_tokens == group_size * (17 if global_pool == "token" else 16)


def test_soft_takes_num_tokens_and_slots_as_given():
    assert tiny(capacity_factor=1.0, num_tokens=64).blocks[3].mlp.router.slots_per_expert == 16
    assert tiny(slots_per_expert=3).blocks[3].mlp.router.slots_per_expert == 3
    assert tiny(scale_init=16.0).blocks[3].mlp.router.scale == 16


def test_options_reach_the_routers_and_layers():
    options = {"top_k": 2, "capacity_factor": 0.5, "eval_capacity_factor": 2.0, "noise_std": 0.5, "combine": "plan"}
    model = tiny(router="sinkhorn_token_choice", group_size=2, same_init=True, bias=False, **options)
    layer = model.blocks[2].mlp
    router = layer.router
    assert (router.top_k, router.capacity_factor, router.eval_capacity_factor, router.noise_std) == (2, 0.5, 2.0, 0.5)
    assert router.affinity.combine == "plan"
    assert layer.group_size == 2 and layer.experts.b1 is None
    assert torch.equal(layer.experts.w1[0], layer.experts.w1[3])
    assert layer.experts.w1.shape == (4, 16, 32)
    gated = tiny(router="soft", glu=True).blocks[2].mlp.experts
    assert gated.glu and gated.w1.shape == (4, 16, 2 * 32) and gated.w2.shape == (4, 32, 16)


def test_drop_and_drop_path():
    model = tiny(router="softmax_expert_choice", proj_drop_rate=0.25, drop_path_rate=0.3)
    assert [block.drop_path2.drop_prob for block in model.blocks[1:]] == pytest.approx([0.1, 0.2, 0.3])
    assert all(block.attn.proj_drop.p == 0.25 for block in model.blocks)
    assert model.blocks[0].mlp.drop1.p == 0.25 and model.blocks[3].mlp.experts.drop.p == 0.25
    x = images()
    model = with_a_head(model)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_an_image_does_not_depend_on_its_batch_with_groups_of_one(router):
    model = with_a_head(tiny(router=router)).eval()
    x = images()
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_batches_that_the_group_size_does_not_divide():
    model = tiny(router="softmax_token_choice", group_size=3)
    with pytest.raises(ValueError, match="group_size=3"):
        model.train()(images(4))
    assert model.eval()(images(4)).shape == (4, 10)


def test_gradient_checkpointing_gives_the_same_gradients():
    x = images()

    def gradients(checkpointing):
        torch.manual_seed(2)
        model = with_a_head(tiny(router="softmax_token_choice", noise_std=0.0, importance_loss_weight=1.0))
        model.set_grad_checkpointing(checkpointing)
        (model.train()(x).square().mean() + vr.aux_loss(model)).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    torch.testing.assert_close(gradients(True), gradients(False))


def test_timm_features_of_every_block():
    features = tiny().forward_intermediates(images(), intermediates_only=True)
    assert [feature.shape for feature in features] == [(4, 16, 4, 4)] * 4


def test_state_dict_goes_into_another_model():
    one, other = with_a_head(tiny(pos_embed="sincos")).eval(), tiny(pos_embed="sincos").eval()
    other.load_state_dict(one.state_dict())
    x = images()
    assert torch.equal(one(x), other(x))


def test_sizes():
    model = vit_moe(**SIZES["Ti"], img_size=32, num_experts=2, num_classes=3)
    assert model.embed_dim == 192 and len(model.blocks) == 12 and model.blocks[0].attn.num_heads == 3
    assert sum(isinstance(module, vr.MoEMlp) for module in model.modules()) == 6


@pytest.mark.parametrize(("error", "names", "options"), [
    (ValueError, "img_size", {"img_size": 9}),
    (ValueError, "img_size", {"img_size": 0}),
    (ValueError, "img_size", {"img_size": (8, 8, 8)}),
    (ValueError, "patch_size", {"patch_size": 2.0}),
    (ValueError, "patch_size", {"patch_size": None}),
    (ValueError, "in_chans", {"in_chans": 0}),
    (TypeError, "in_chans", {"in_chans": "rgb"}),
    (ValueError, "num_classes", {"num_classes": -1}),
    (TypeError, "num_classes", {"num_classes": None}),
    (ValueError, "embed_dim", {"embed_dim": 0}),
    (ValueError, "embed_dim 16 is not a multiple of num_heads 3", {"num_heads": 3}),
    (ValueError, "depth", {"depth": 0}),
    (TypeError, "depth", {"depth": 4.0}),
    (ValueError, "num_heads", {"num_heads": -2}),
    (ValueError, "mlp_ratio", {"mlp_ratio": 0}),
    (ValueError, "mlp_ratio", {"mlp_ratio": 0.01}),
    (ValueError, "mlp_ratio", {"mlp_ratio": float("inf")}),
    (TypeError, "mlp_ratio", {"mlp_ratio": "4"}),
    (ValueError, "router", {"router": "hard"}),
    (ValueError, "num_experts", {"num_experts": 0}),
    (TypeError, "num_experts", {"num_experts": 4.0}),
    (ValueError, "group_size", {"group_size": 0}),
    (TypeError, "group_size", {"group_size": True}),
    (ValueError, "global_pool", {"global_pool": "max"}),
    (TypeError, "qk_norm", {"qk_norm": "yes"}),
    (ValueError, "pos_embed", {"pos_embed": "rope"}),
    (ValueError, "embed_dim is 10.*sincos", {"embed_dim": 10, "pos_embed": "sincos"}),
    (ValueError, "pos_embed_std", {"pos_embed_std": -1.0}),
    (ValueError, "pos_embed_std", {"pos_embed_std": float("nan")}),
    (ValueError, "drop_rate", {"drop_rate": 1.0}),
    (ValueError, "proj_drop_rate", {"proj_drop_rate": 1.0}),
    (TypeError, "proj_drop_rate", {"proj_drop_rate": "a"}),
    (ValueError, "drop_path_rate", {"drop_path_rate": -0.1}),
    (ValueError, "router is None.*top_k", {"router": None, "top_k": 2}),
    (TypeError, "top_k", {"router": "soft", "top_k": 2}),
    (ValueError, "top_k", {"router": "softmax_token_choice", "top_k": 5}),
    (ValueError, "capacity_factor", {"router": "softmax_token_choice", "capacity_factor": 0.0}),
    (ValueError, "capacity_factor", {"capacity_factor": 1.0, "slots_per_expert": 1}),
    (TypeError, "eval_capacity_factor", {"capacity_factor": 1.0, "eval_capacity_factor": 2.0}),
    (TypeError, "colour", {"colour": "red"}),
    (TypeError, "drop", {"drop": 0.1}),
    (TypeError, "device", {"device": "cpu"}),
])  # fmt: skip
def test_refuses(error, names, options):
    with pytest.raises(error, match=names):
        tiny(**options)


@pytest.mark.parametrize(
    ("failure", "advice"),
    [
        (ModuleNotFoundError("No module named 'timm'"), "pip install timm"),
        # a torchvision built for another torch, at its first import and at the next import
        (RuntimeError("operator torchvision::nms does not exist"), "install --force-reinstall --no-deps torchvision"),
        (
            AttributeError("partially initialized module 'torchvision'"),
            "install --force-reinstall --no-deps torchvision",
        ),
    ],
)
def test_says_what_to_install_where_timm_does_not_import(monkeypatch, failure, advice):
    class Broken:
        @staticmethod
        def find_spec(name, *_):
            if name == "timm.models.vision_transformer":
                raise failure

    source = models.__file__
    monkeypatch.delitem(sys.modules, "timm.models.vision_transformer")
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(ImportError, match=advice) as raised:
        runpy.run_path(source)
    assert str(failure) in str(raised.value)


def test_a_router_of_the_user_is_made_for_every_layer():
    router = vr.create_router("soft", 16, 4)
    dense = tiny(router=None)
    for make in (tiny, lambda router: upcycle(dense, router=router, num_experts=4)):
        with pytest.raises(TypeError, match=r"router must be a name, or a function .* got one SoftRouter"):
            make(router=router)


def test_blocks_from_an_iterator():
    dense = upcycle(tiny(router=None), router="soft", num_experts=2, blocks=iter([0, 3]))
    for model in (dense, tiny(moe_blocks=(i for i in (3, 0)))):
        assert [isinstance(block.mlp, vr.MoEMlp) for block in model.blocks] == [True, False, False, True]
        assert model.moe_config["moe_blocks"] == [0, 3]


def test_own_experts_are_no_option():
    """Every block needs its own experts, and one argument would give all blocks the same experts."""
    experts = [torch.nn.Linear(16, 16) for _ in range(2)]
    with pytest.raises(TypeError, match="vit_moe: experts is not an option"):
        vit_moe(8, 4, embed_dim=16, depth=2, num_heads=2, num_experts=2, experts=experts)
    dense = vit_moe(8, 4, embed_dim=16, depth=2, num_heads=2, router=None)
    with pytest.raises(TypeError, match="upcycle: experts is not an option"):
        upcycle(dense, router="soft", num_experts=2, experts=experts)
