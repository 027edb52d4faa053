"""Layers under the wrappers of torch.distributed, in one process: the hooks find every tensor, and aux_loss works."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import vmoe_routers as vr
from vmoe_routers.models import vit_moe

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of torch.distributed about a group of one process


def layers(router):
    options = {} if router == "soft" else {"importance_loss_weight": 0.5}
    return nn.Sequential(*(vr.MoEMlp(8, 12, num_experts=4, router=router, **options) for _ in range(2)))


def gradients(model, x):
    model.zero_grad()
    torch.manual_seed(1)
    (model(x).square().sum() + vr.aux_loss(model)).backward()
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_fsdp2_also_of_the_router_alone(mesh, router):
    model, x = layers(router), torch.randn(4, 6, 8)
    wanted = gradients(copy.deepcopy(model), x)
    for layer in model:
        fully_shard(layer.router, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):
        torch.testing.assert_close(gradients(model, x), wanted)


@pytest.mark.parametrize("router", ["softmax_token_choice", "soft"])
def test_ddp(mesh, router):
    model, x = layers(router), torch.randn(4, 6, 8)
    wanted = gradients(copy.deepcopy(model), x)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        torch.testing.assert_close(gradients(wrapped, x), wanted)


def test_fsdp2_from_the_meta_device(mesh):
    with torch.device("meta"):
        model = layers("softmax_token_choice")
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for gradient in gradients(model, torch.randn(4, 6, 8)):
        assert gradient.isfinite().all()
    assert vr.aux_loss(model) == 0


def test_fsdp2_of_a_model_from_the_meta_device(mesh):
    options = {"embed_dim": 16, "depth": 2, "num_heads": 2, "num_experts": 3, "global_pool": "map", "same_init": True}
    torch.manual_seed(3)
    wanted = vit_moe(8, 2, 1, 5, **options, router="soft").state_dict()
    with torch.device("meta"):
        model = vit_moe(8, 2, 1, 5, **options, router="soft")
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.init_weights()
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), wanted[name]), name
    model(torch.randn(2, 1, 8, 8)).sum().backward()


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_torchinfo(router):
    torchinfo = pytest.importorskip("torchinfo")
    model = layers(router)
    summary = torchinfo.summary(model, input_data=torch.randn(4, 6, 8), verbose=0)
    assert summary.total_params == sum(p.numel() for p in model.parameters())
