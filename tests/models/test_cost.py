"""The cost of a model: counted by hand, by torch's counter, and on the page of models."""

import model_table
import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vmoe_routers as vr
from vmoe_routers.models import cost, upcycle, vit_moe

# An image has 8 x 8 pixels in patches of 2 x 2: 16 tokens of width 16. The hidden width is 32.
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
TRUNK = 2 * 16 * (2 * 2 * 16) + 2 * (16 * 10) + 2 * (2 * 16 * 4 * 16 * 16 + 2 * 2 * 16 * 16 * 16)
MLP = 2 * 16 * (16 * 32 + 32 * 16)
ROUTER = 2 * 16 * 4 * 16
EXPERTS = 4 * (2 * 16 * 32 + 32 + 16)


def expert_flops(slots):
    return 2 * slots * (16 * 32 + 32 * 16)


def counted(model, size):
    """Returns the operations for one image, as torch's counter counts them."""
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 3, size, size))
    return counter.get_total_flops()


@pytest.mark.parametrize(("router", "options", "slots", "layer"), [
    # 64 tokens in a group of 4 images: C = 16 slots for each of 4 experts
    ("softmax_expert_choice", {}, 4 * 16 / 4, expert_flops(16) + ROUTER),
    ("sinkhorn_expert_choice", {"capacity_factor": 0.3}, 4 * 5 / 4, expert_flops(5) + ROUTER),  # 4.8, rounded up
    # Token Choice rounds up to a multiple of 4
    ("softmax_token_choice", {"capacity_factor": 0.3}, 4 * 8 / 4, expert_flops(8) + ROUTER),
    ("softmax_token_choice", {"top_k": 2}, 4 * 32 / 4, expert_flops(32) + ROUTER),
    ("sinkhorn_token_choice", {"combine": "plan"}, 4 * 16 / 4, expert_flops(16) + ROUTER),
    # logits, dispatch and combine: three products of 16 tokens, 16 or 32 slots and width 16
    ("soft", {"group_size": 1, "capacity_factor": 1.0}, 16, expert_flops(16) + 3 * 2 * 16 * 16 * 16),
    ("soft", {"group_size": 1, "slots_per_expert": 8}, 32, expert_flops(32) + 3 * 2 * 16 * 32 * 16),
    # every token meets the 8 slots of its group
    ("soft", {"group_size": 4, "slots_per_expert": 2}, 2, expert_flops(2) + 3 * 2 * 16 * 8 * 16),
])  # fmt: skip
def test_by_hand(router, options, slots, layer):
    model = vit_moe(8, 2, 1, 10, **SIZES, router=router, num_experts=4, **{"group_size": 4, **options})
    found = cost(model)
    assert found["tokens"] == 16 and found["slots"] == slots
    assert found["mlp_flops"] == MLP + layer  # the first block is dense
    assert found["flops"] == TRUNK + MLP + layer
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    unused = EXPERTS * (1 - slots / 16 / 4)
    assert found["active_parameters"] == pytest.approx(found["parameters"] - unused)


def test_of_training_and_eval():
    options = {"capacity_factor": 1.0, "eval_capacity_factor": 2.0, "num_experts": 4}
    model = vit_moe(8, 2, 1, 10, **SIZES, router="softmax_expert_choice", **options)
    assert 2 * cost(model.train())["slots"] == cost(model.eval())["slots"] == 32


@pytest.mark.parametrize("options", [
    {}, {"global_pool": "token"}, {"global_pool": "map"}, {"pre_logits": True, "qk_norm": True}, {"num_classes": 0},
], ids=str)  # fmt: skip
def test_dense_by_torch_counter(options):
    model = vit_moe(**{"img_size": 8, "patch_size": 2, "num_classes": 10, **SIZES, **options}, router=None).eval()
    found = cost(model)
    assert found["flops"] == counted(model, 8)
    assert found["active_parameters"] == found["parameters"]


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_moe_models_by_torch_counter(router):
    options = {"group_size": 1, **({"slots_per_expert": 3} if router == "soft" else {"capacity_factor": 1.5})}
    model = vit_moe(8, 2, 3, 10, **SIZES, router=router, num_experts=4, **options).eval()
    assert cost(model)["flops"] == counted(model, 8)


@pytest.mark.parametrize("router", ["softmax_token_choice", "soft"])
@pytest.mark.parametrize(("wanted", "backward"), [
    # Backward has a product for the gradient of each factor, and the product w2^T is needed for every gradient.
    ({"x", "router", "experts"}, {"router": 2, "w1": 2, "w2": 2}),
    ({"x", "router"}, {"router": 2, "w1": 1, "w2": 1}),
])  # fmt: skip
def test_backward_by_torch_counter(router, wanted, backward):
    layer = vr.MoEMlp(16, 32, 24, num_experts=4, router=router)
    layer.router.requires_grad_("router" in wanted)
    layer.experts.requires_grad_("experts" in wanted)
    x = torch.randn(3, 16, 16, requires_grad="x" in wanted)
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    slots = 3 * 4 * layer.router.slots(16)
    logits = 2 * 16 * 16 * (slots if router == "soft" else 3 * 4)
    mixtures = 2 * 16 * slots * (16 + 24) if router == "soft" else 0  # tokens of width 16, outputs of width 24
    products = {"router": logits + mixtures, "w1": 2 * slots * 16 * 32, "w2": 2 * slots * 32 * 24}
    assert counter.get_total_flops() == sum(times * products[name] for name, times in backward.items())


def test_backward_of_experts_alone_by_torch_counter():
    experts = vr.Experts(4, 16, 32, 24)
    y = experts(torch.randn(4, 2, 3, 16))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 4 * 2 * 3 * (16 * 32 + 2 * 32 * 24)


GATED = [
    "vit_giant_patch14_dinov2",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "vit_small_plus_patch16_dinov3",
]


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_small_patch14_reg4_dinov2", *GATED])
def test_models_of_timm_by_torch_counter(name):
    options = {"img_size": 224, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(name, **options).eval()
    assert cost(model)["flops"] == counted(model, 224)
    if name in GATED:  # torch computes the products of gated experts, so torch's counter counts them
        upcycle(model, router="softmax_expert_choice", num_experts=4, capacity_factor=2.0)
        assert cost(model)["flops"] == counted(model, 224)


@pytest.mark.parametrize("name", ["vit_base_resnet26d_224", "beit_base_patch16_224", "resnet18"])
def test_refuses_other_models(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(TypeError, match="cost: model must be a ViT or EVA of timm"):
        cost(model)


class Uncounted(nn.Module):
    """A router without the method `slots`."""

    def __init__(self, dim, num_experts):
        super().__init__()
        self.dim, self.num_experts = dim, num_experts

    def forward(self, x, mask=None):
        gates = torch.rand(*x.shape[:2], self.num_experts)
        return vr.token_choice(gates, top_k=1, capacity=x.shape[1] // 4)


def test_slots_of_a_router_that_does_not_say_them():
    model = vit_moe(8, 2, embed_dim=16, depth=2, num_heads=2, router=Uncounted, num_experts=3, group_size=2)
    state = torch.random.get_rng_state()
    assert cost(model)["slots"] == 3 * 8 / 2
    assert torch.equal(torch.random.get_rng_state(), state)


def test_of_an_upcycled_model():
    model = timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=16, num_heads=2, num_classes=5)
    dense = cost(model)
    options = {"router": "softmax_expert_choice", "num_experts": 4}
    sparse = cost(upcycle(model, **options, capacity_factor=1.0))
    assert dense["tokens"] == 197 and sparse["slots"] == 4 * 49
    router = 2 * 197 * 16 * 4
    assert sparse["flops"] == dense["flops"] + router - 2 * (2 * 16 * 64)  # one slot fewer than tokens
    assert sparse["active_parameters"] < sparse["parameters"]


def test_the_page():
    assert model_table.PAGE.read_text() == model_table.page(), f"write it anew: {model_table.COMMAND}"
