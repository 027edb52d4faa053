"""DeepSpeed ZeRO-3, in one process on the CPU: training as without it, and the state that save_pretrained needs."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch.optim import SGD

import vmoe_routers as vr
from vmoe_routers.checkpoints import CheckpointError, from_pretrained, save_pretrained
from vmoe_routers.models import vit_moe

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]  # warnings of DeepSpeed

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        # DeepSpeed replaces this function permanently by a function that refuses forward mode. Restore it after these
        # tests.
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        module = pytest.importorskip("deepspeed", reason="pip install deepspeed --no-build-isolation")
        store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        module.init_distributed("gloo")
        yield module
        dist.destroy_process_group()


@pytest.mark.parametrize("router", ["softmax_token_choice", "sinkhorn_expert_choice", "soft"])
def test_trains_and_saves(deepspeed, router, tmp_path):
    options = {} if router == "soft" else {"importance_loss_weight": 0.5, "noise_std": 0.0}
    model = vit_moe(8, 4, 1, 3, embed_dim=16, depth=2, num_heads=2, router=router, num_experts=4, **options)
    torch.nn.init.normal_(model.head.weight)
    plain, images = copy.deepcopy(model), torch.randn(4, 1, 8, 8)
    engine, *_ = deepspeed.initialize(model=model, optimizer=SGD(model.parameters(), lr=0.01), config=CONFIG)
    optimizer = SGD(plain.parameters(), lr=0.01)
    for _ in range(2):
        engine.backward(engine(images).square().mean() + vr.aux_loss(engine))
        engine.step()
        (plain(images).square().mean() + vr.aux_loss(plain)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(CheckpointError, match="partitioned by DeepSpeed ZeRO-3, wanted state_dict=engine"):
        save_pretrained(engine, tmp_path)
    save_pretrained(engine, tmp_path, state_dict=engine._zero3_consolidated_16bit_state_dict())
    torch.testing.assert_close(from_pretrained(tmp_path).state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
