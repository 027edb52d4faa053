"""save_pretrained of wrapped and sharded models."""

import pytest
import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from vmoe_routers.checkpoints import CheckpointError, from_pretrained, save_pretrained
from vmoe_routers.models import upcycle, vit_moe

# Warnings of torch.distributed about a group of one process.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

SIZES = {"img_size": 16, "patch_size": 8, "num_classes": 5, "embed_dim": 16, "depth": 2, "num_heads": 2}


def model():
    return vit_moe(**SIZES, router="soft", num_experts=4).eval()


def blocks_wrapped(wrap):
    def wrapped(model):
        for i, block in enumerate(model.blocks):
            model.blocks[i] = wrap(block)
        return model

    return wrapped


def sharded(model):
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


WRAPPERS = {
    "compile": torch.compile,
    "blocks compiled": blocks_wrapped(torch.compile),
    "blocks checkpointed": blocks_wrapped(checkpoint_wrapper),
    "average": AveragedModel,
    "ema": ModelEmaV3,
    "data parallel": DataParallel,
    "ddp": DistributedDataParallel,
    "ddp, compiled": lambda model: torch.compile(DistributedDataParallel(model)),
    "fsdp2": sharded,
    "fsdp2, compiled": lambda model: torch.compile(sharded(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_models(mesh, tmp_path, wrapper):
    plain = model()
    wanted = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    save_pretrained(WRAPPERS[wrapper](plain), tmp_path)
    found = from_pretrained(tmp_path).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)


def test_a_state_dict_of_the_wrapper(mesh, tmp_path):
    plain = model()
    for i, wrapper in enumerate((torch.compile(plain), DistributedDataParallel(plain), AveragedModel(plain))):
        save_pretrained(plain, tmp_path / str(i), state_dict=wrapper.state_dict())
        assert torch.equal(from_pretrained(tmp_path / str(i)).blocks[1].mlp.experts.w1, plain.blocks[1].mlp.experts.w1)


def test_only_the_first_process_writes(mesh, tmp_path, monkeypatch):
    plain = sharded(model())
    monkeypatch.setattr(dist, "get_rank", lambda *_: 1)
    save_pretrained(plain, tmp_path)
    assert not list(tmp_path.iterdir())


def test_fsdp1_says_what_to_give(mesh, tmp_path):
    plain = model()
    wrapped = FullyShardedDataParallel(plain, device_id=torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"wanted state_dict=model\.state_dict\(\), called within") as error:
        save_pretrained(wrapped, tmp_path)
    assert "\n" not in str(error.value)
    save_pretrained(wrapped, tmp_path, state_dict=wrapped.state_dict())
    assert from_pretrained(tmp_path).num_classes == 5


def test_blocks_in_fsdp1_of_an_upcycled_model(mesh, tmp_path):
    dense = timm.create_model("vit_tiny_patch16_224", **SIZES)
    plain = upcycle(dense, router="softmax_expert_choice", num_experts=2)
    wanted = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    wrapped = FullyShardedDataParallel(
        plain, auto_wrap_policy=ModuleWrapPolicy({type(plain.blocks[1])}), device_id=torch.device("cpu")
    )
    state_dict = wrapped.state_dict()
    save_pretrained(wrapped, tmp_path, state_dict=state_dict)
    found = from_pretrained(tmp_path).state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    plain.blocks[1].mlp.router.capacity_factor = 2.0
    with pytest.raises(CheckpointError, match="capacity_factor"):
        save_pretrained(wrapped, tmp_path, state_dict=state_dict)


def test_a_module_around_the_model_is_no_wrapper(tmp_path):
    with pytest.raises(CheckpointError, match="Sequential has no moe_config, wanted a model that") as error:
        save_pretrained(nn.Sequential(model()), tmp_path)
    assert "\n" not in str(error.value)
