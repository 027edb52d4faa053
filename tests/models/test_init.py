"""init_weights: after the meta device and to_empty, a model has the values that vit_moe draws."""

import math

import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers.models import MoEVisionTransformer, upcycle, vit_moe

SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2}
KINDS = {
    "dense": {"router": None},
    "soft": {"router": "soft", "global_pool": "map", "qk_norm": True, "scale_init": 3.0},
    "sincos": {"router": "softmax_expert_choice", "global_pool": "token", "pos_embed": "sincos"},
    "gated": {"router": "softmax_token_choice", "glu": True, "same_init": True, "pre_logits": True},
    "first block": {"router": "sinkhorn_token_choice", "moe_blocks": [0], "pos_embed_std": 0.7},
}


def make(**options):
    return vit_moe(8, 2, 1, 5, **SIZES, num_experts=3, **options)


def emptied(model):
    """Fills a model with values that uninitialised memory may have after to_empty."""
    model.to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(math.nan)
    return model


def differing(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


@pytest.mark.parametrize("kind", KINDS)
def test_is_as_made(kind):
    torch.manual_seed(3)
    wanted = make(**KINDS[kind])
    with torch.device("meta"):
        model = emptied(make(**KINDS[kind]))
    torch.manual_seed(3)
    model.init_weights()
    assert not differing(model, wanted)
    for module in model.modules():  # FSDP's tutorials do this
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert differing(model, wanted)
    torch.manual_seed(3)
    model.init_weights()
    assert not differing(model, wanted)


def test_positions_of_another_image_size():
    model = make(router="soft", pos_embed="sincos")
    model.set_input_size(img_size=(12, 8))
    model.init_weights()
    torch.testing.assert_close(model.pos_embed[:, :16], make(router="soft", pos_embed="sincos").pos_embed)


def test_an_upcycled_model_of_vit_moe():
    torch.manual_seed(3)
    wanted = make(router="soft", moe_blocks=[1])
    model = upcycle(make(router=None), router="soft", num_experts=3, blocks=[1])
    torch.manual_seed(3)
    model.init_weights()
    assert not differing(model, wanted)


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_a_layer_is_as_made(router):
    torch.manual_seed(3)
    wanted = vr.MoEMlp(8, 12, num_experts=4, router=router)
    with torch.device("meta"):
        layer = emptied(vr.MoEMlp(8, 12, num_experts=4, router=router))
    torch.manual_seed(3)
    layer.reset_parameters()
    assert not differing(layer, wanted)


class Own(nn.Module):
    """A router whose parameters cannot be drawn again."""

    def __init__(self, dim, num_experts):
        super().__init__()
        self.dim, self.num_experts = dim, num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, dim))

    def forward(self, x, mask=None):
        return vr.token_choice((x @ self.weight.T).softmax(-1), 1, 4, mask=mask)


def test_own_parts():
    experts = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)]
    layer = vr.MoEMlp(8, num_experts=2, router="soft", experts=experts)
    before = layer.experts[1][0].weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.experts[1][0].weight, before)
    model = make(router=Own)
    with pytest.raises(TypeError, match="Own has parameters, but no reset_parameters"):
        model.init_weights()


def test_refuses_another_scheme_and_leaves_timms_models_to_timm():
    with pytest.raises(ValueError, match=r"mode must be .*, got 'jax'"):
        make(router="soft").init_weights("jax")
    model = MoEVisionTransformer(img_size=8, patch_size=2, in_chans=1, num_classes=5, **SIZES)
    model.init_weights("moco")
    assert model.head.weight.any()
