"""upcycle: the weights that it keeps, the outputs that it preserves, the models that it refuses."""

import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.layers import GatedMlp, GluMlp, Mlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vmoe_routers as vr
from vmoe_routers.models import upcycle, vit_moe

SPARSE = [name for name in vr.ROUTERS if name != "soft"]
TINY = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 5, "embed_dim": 16, "depth": 4, "num_heads": 2}
PLAIN = {}
DEIT = {"class_token": True, "global_pool": "token", "qkv_bias": True}
DINO = {"init_values": 1e-1, "reg_tokens": 4, "class_token": True, "global_pool": "token", "no_embed_class": True}


def dense(**options):
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, **options).eval()
    for parameter in model.parameters():  # biases, heads and layer scales differ from their initial values
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def whole(router, **options):
    """Returns options with which every token gets an expert, with weights that sum to 1."""
    room = {"top_k": 2, "capacity_factor": 4.0} if router.endswith("token_choice") else {"capacity_factor": 4.0}
    return {"router": router, "num_experts": 4, "renormalize": True, **room, **options}


@pytest.mark.parametrize("kind", [PLAIN, DEIT, DINO], ids=["plain", "deit", "dino"])
@pytest.mark.parametrize("router", SPARSE)
def test_starts_where_the_dense_model_was(router, kind):
    model = dense(**kind)
    x = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        wanted = model(x)
        sparse = upcycle(copy.deepcopy(model), blocks="every_2", **whole(router)).eval()
        torch.testing.assert_close(sparse(x), wanted, rtol=1e-4, atol=1e-5)
        # Without these options the outputs differ.
        less = {"capacity_factor": 1.0} | ({"renormalize": False} if router.endswith("token_choice") else {})
        other = upcycle(copy.deepcopy(model), blocks="every_2", **whole(router) | less).eval()
        assert not torch.allclose(other(x), wanted, rtol=1e-4, atol=1e-5)
        noisy = upcycle(copy.deepcopy(model), blocks="every_2", **whole(router), noise=0.3).eval()
        assert not torch.allclose(noisy(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_only_the_mlps_of_the_blocks_change(router):
    model = dense(**DINO)
    before = copy.deepcopy(model)
    options = {"capacity_factor": 1.0} if router == "soft" else {}
    assert upcycle(model, router=router, num_experts=3, blocks=[0, 3], group_size=1, **options) is model
    for i, (block, old) in enumerate(zip(model.blocks, before.blocks)):
        assert isinstance(block.mlp, vr.MoEMlp) == (i in (0, 3))
        if i in (0, 3):
            experts = block.mlp.experts
            for e in range(3):
                assert torch.equal(experts.w1[e], old.mlp.fc1.weight.T) and torch.equal(experts.b1[e], old.mlp.fc1.bias)
                assert torch.equal(experts.w2[e], old.mlp.fc2.weight.T) and torch.equal(experts.b2[e], old.mlp.fc2.bias)
            assert not block.mlp.training and type(experts.act) is type(old.mlp.act)
    rest = {k: v for k, v in before.state_dict().items() if not k.startswith(("blocks.0.mlp", "blocks.3.mlp"))}
    for key, value in rest.items():
        assert torch.equal(model.state_dict()[key], value)
    if router == "soft":
        assert model.blocks[0].mlp.router.slots_per_expert == round((16 + 5) / 3)
    model(torch.randn(2, 1, 8, 8)).sum().backward()
    # Experts do not share memory: training one does not change another.
    experts.w1.data[0] = 0
    assert torch.equal(experts.w1[1], old.mlp.fc1.weight.T)


def test_noise_breaks_the_symmetry():
    model = upcycle(dense(), router="soft", num_experts=64, noise=0.5, blocks=[1])
    w1 = model.blocks[1].mlp.experts.w1.detach()
    relative = (w1 - w1.mean(0)).std() / dense().blocks[1].mlp.fc1.weight.detach().std()
    assert float(relative) == pytest.approx(0.5, rel=0.05)


def test_dtype_device_dropout_and_bias():
    torch.manual_seed(0)
    model = VisionTransformer(**TINY, proj_drop_rate=0.25).double()
    for block in model.blocks:
        block.mlp = Mlp(16, 32, bias=False, act_layer=nn.ReLU, drop=0.25).double()
    layer = upcycle(model, router="softmax_token_choice", num_experts=2).blocks[3].mlp
    assert layer.experts.w1.dtype == torch.float64 and layer.experts.b1 is None
    assert layer.experts.drop.p == 0.25 and isinstance(layer.experts.act, nn.ReLU) and layer.training


def test_models_of_timm():
    for name in ("vit_small_patch14_reg4_dinov2", "deit_tiny_patch16_224"):
        with torch.device("meta"):
            model = timm.create_model(name, img_size=28 if "14" in name else 32)
            layer = upcycle(model, router="sinkhorn_expert_choice", num_experts=2).blocks[-1].mlp
        assert isinstance(layer, vr.MoEMlp) and layer.experts.w1.shape[1:] == (
            model.embed_dim,
            4 * model.embed_dim,
        )


NORM = partial(nn.LayerNorm, eps=1e-3)  # not the default, so that it must be copied
MLPS = {
    "one bias": lambda: Mlp(16, 24, bias=(True, False)),
    "the other bias": lambda: SwiGLU(16, 24, bias=(False, True)),
    "norm": lambda: Mlp(16, 24, act_layer=nn.ReLU, norm_layer=NORM),
    "packed": lambda: SwiGLUPacked(16, 24),
    "packed, normed": lambda: SwiGLUPacked(16, 24, norm_layer=NORM, bias=False),
    "gate last": lambda: GluMlp(16, 24),
    "apart": lambda: SwiGLU(16, 24),
    "apart, normed": lambda: SwiGLU(16, 24, norm_layer=partial(NORM, bias=False)),
}


@pytest.mark.parametrize("kind", MLPS)
def test_every_kind_of_mlp(kind):
    torch.manual_seed(0)
    model = dense()
    for block in model.blocks:
        block.mlp = MLPS[kind]()
        for parameter in block.mlp.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    sparse = upcycle(copy.deepcopy(model), **whole("softmax_token_choice"))
    mlp, layer = model.blocks[3].mlp, sparse.blocks[3].mlp
    x = torch.randn(2, 9, 16)
    torch.testing.assert_close(layer(x), mlp(x), rtol=1e-5, atol=1e-5)
    experts = layer.experts
    assert experts.glu == (not isinstance(mlp, Mlp)) and type(experts.act) is type(mlp.act)
    # Every expert has its own parameters: setting one expert to 0 leaves the outputs of another expert unchanged.
    for parameter in experts.parameters():
        parameter.data[0] = 0
    slots = x.expand(4, 2, 9, 16)
    torch.testing.assert_close(experts(slots)[1:], mlp(slots[1:]), rtol=1e-5, atol=1e-5)
    assert not experts(slots)[0].any()


def test_noise_of_the_gate_and_of_the_value():
    """Gate and value get noise of different standard deviations, because timm initialises gates with smaller values."""
    model = dense()
    mlp = model.blocks[3].mlp = SwiGLUPacked(16, 64)
    mlp.fc1.weight.data[:32] *= 1e-4
    mlp.fc1.bias = None
    experts = upcycle(model, router="soft", num_experts=64, noise=0.5, blocks=[3]).blocks[3].mlp.experts
    for ours, theirs in zip(experts.w1.chunk(2, dim=2), mlp.fc1.weight.chunk(2), strict=True):
        assert ((ours - theirs.T).std() / theirs.std()).item() == pytest.approx(0.5, rel=0.05)


# The models have packed weights, separate weights, aligned widths, a norm inside, and MLPs without a gate.
GATED = [
    ("vit_giant_patch14_dinov2", 14),
    ("vit_giant_patch14_reg4_dinov2", 14),
    ("aimv2_large_patch14_224", 14),
    ("eva02_tiny_patch14_224", 14),
    ("eva02_base_patch14_224", 14),
    ("eva02_base_patch16_clip_224", 16),
    ("eva02_enormous_patch14_clip_224", 14),
    ("vit_small_patch16_dinov3", 16),
    ("vit_small_plus_patch16_dinov3", 16),
    ("vit_7b_patch16_dinov3", 16),
]


@pytest.mark.parametrize(("name", "patch"), GATED)
def test_models_of_timm_start_where_they_were(name, patch, tmp_path):
    torch.manual_seed(0)

    def create():
        sizes = {"img_size": 3 * patch, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
        return timm.create_model(name, **sizes).eval()

    options = {"blocks": [0, 1], **whole("softmax_token_choice")}
    model = create()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 3 * patch, 3 * patch)
    with torch.no_grad():
        wanted = model(x)
        sparse = upcycle(copy.deepcopy(model), **options)
        torch.testing.assert_close(sparse(x), wanted, rtol=0, atol=1e-5)
        torch.save(sparse.state_dict(), tmp_path / "state.pt")
        loaded = upcycle(create(), **options)
        loaded.load_state_dict(torch.load(tmp_path / "state.pt"))
        torch.testing.assert_close(loaded(x), wanted, rtol=0, atol=1e-5)
        for layer in (sparse.blocks[0].mlp, sparse.blocks[1].mlp):  # the layers have an effect on the outputs
            layer.experts.w2.zero_()
        assert not torch.allclose(sparse(x), wanted, rtol=0, atol=1e-3)


def test_its_own_models_too():
    model = vit_moe(**TINY, router=None)
    assert isinstance(upcycle(model, router="soft", num_experts=2).blocks[3].mlp, vr.MoEMlp)
    with pytest.raises(TypeError, match=r"blocks\[2\]\.mlp must be an MLP of linear layers .*, got MoEMlp"):
        upcycle(model, router="soft", num_experts=2)


def gmlp(model):
    model.blocks[3].mlp = GatedMlp(16, 32)


def convolutions(model):
    model.blocks[3].mlp = GluMlp(16, 32, use_conv=True)


def adapted(model):
    model.blocks[3].mlp.fc2 = nn.Sequential(model.blocks[3].mlp.fc2)


class Residual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


def residual(model):
    model.blocks[3].mlp = Residual(16, 32)


def normed(model):
    model.blocks[3].mlp = Mlp(16, 32, norm_layer=RmsNorm)


def two_rates(model):
    model.blocks[3].mlp = Mlp(16, 32, drop=(0.1, 0.2))


def half_biased(model):
    model.blocks[3].mlp = SwiGLU(16, 32)
    model.blocks[3].mlp.fc1_x.bias = None


@pytest.mark.parametrize(("change", "options", "error", "words"), [
    (gmlp, {}, TypeError, r"blocks\[3\]\.mlp must be an MLP of linear layers of timm, .*, got GatedMlp"),
    (convolutions, {}, TypeError, r"blocks\[3\]\.mlp must be an MLP of linear layers .*, got GluMlp"),
    (adapted, {}, TypeError, r"blocks\[3\]\.mlp must be an MLP of linear layers .*, got Mlp"),
    (residual, {}, TypeError, r"blocks\[3\]\.mlp \(Residual\) computes something else than its layers in order"),
    (normed, {}, ValueError, r"blocks\[3\]\.mlp has a RmsNorm inside, wanted a LayerNorm or no norm"),
    (two_rates, {}, ValueError, "two dropout rates, 0.1 and 0.2"),
    (half_biased, {}, ValueError, r"blocks\[3\]\.mlp has a bias in one of fc1_g and fc1_x"),
    (None, {"router": "hard"}, ValueError, "router"),
    (None, {"num_experts": 0}, ValueError, "num_experts"),
    (None, {"noise": -1.0}, ValueError, "noise"),
    (None, {"blocks": "last_9"}, ValueError, "moe_blocks"),
    (None, {"top_k": 3, "router": "softmax_token_choice"}, ValueError, "top_k"),
])  # fmt: skip
def test_refuses_and_leaves_the_model(change, options, error, words):
    model = dense()
    if change:
        change(model)
    mlps = [block.mlp for block in model.blocks]
    with pytest.raises(error, match=words):
        upcycle(model, **{"router": "soft", "num_experts": 2, "blocks": "last_half", **options})
    assert all(block.mlp is mlp for block, mlp in zip(model.blocks, mlps))


def test_refuses_other_models():
    with pytest.raises(TypeError, match=r"must have transformer blocks, a list of modules with .* got Linear"):
        upcycle(nn.Linear(2, 2), router="soft", num_experts=2)
    with pytest.raises(ValueError, match=r"has blocks at 0\.blocks, 1\.blocks; give the module around one of them"):
        upcycle(nn.Sequential(dense(), dense()), router="soft", num_experts=2)


@pytest.mark.parametrize("router", SPARSE)
def test_models_of_torchvision_start_where_they_were(router):
    torch.manual_seed(0)
    sizes = {"image_size": 12, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 24, "mlp_dim": 48}
    model = torchvision.models.VisionTransformer(**sizes, dropout=0.1, num_classes=5).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        wanted = model(x)
        sparse = upcycle(copy.deepcopy(model), blocks=[0, 1], **whole(router))
        torch.testing.assert_close(sparse(x), wanted, rtol=0, atol=1e-5)
    sparse.train()(x).sum().backward()
    layer = sparse.eval().encoder.layers[1].mlp
    assert layer.router.weight.grad is not None and layer.experts.w1.grad.any()
    with torch.no_grad():
        assert layer.experts.drop.p == 0.1 and type(layer.experts.act) is nn.GELU
        layer.experts.w2.zero_()
        assert not torch.allclose(sparse(x), wanted, rtol=0, atol=1e-3)


def test_tokens_of_a_torchvision_model():
    with torch.device("meta"):
        model = upcycle(torchvision.models.vit_b_16(), router="soft", num_experts=8, capacity_factor=1.0)
    assert model.encoder.layers[-1].mlp.router.slots_per_expert == round(197 / 8)
