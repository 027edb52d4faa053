"""parallelize: checkpointed and compiled blocks, and the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run
from small_models import apart, batch, gradients, loss_of, mine, vit
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_routers as vr
from vmoe_routers.distributed import Meshes, clip_grad_norm_, parallelize


class CountExchanges(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops._c10d_functional.all_to_all_single.default
        return func(*args, **(kwargs or {}))


def checkpointed() -> dict[str, tuple[int, float]]:
    """Returns the number of all-to-alls of a step, and the deviation of the gradients from one process."""
    meshes = Meshes.make("cpu", ep=2)
    found = {}
    for router in ("softmax_token_choice", "soft"):
        alone = vit(router)
        loss_of(alone, *batch(8)).backward()
        for checkpointing in ("none", "exchange_saved", "full"):
            model = parallelize(vit(router), meshes, checkpointing=checkpointing)
            assert model.state_dict().keys() == alone.state_dict().keys()
            with CountExchanges() as exchanges:
                loss_of(model, *mine(*batch(8))).backward()
            found[f"{router} {checkpointing}"] = exchanges.count, apart(gradients(model), gradients(alone))
    return found


def test_checkpoints_keep_the_exchanged_slots():
    found = run(2, checkpointed)[0]
    assert max(difference for _, difference in found.values()) < 1e-10
    # Forward sends slots, the number of filled slots (not of Soft MoE), and results; backward sends two gradients.
    assert {case: count for case, (count, _) in found.items()} == {
        "softmax_token_choice none": 5,
        "softmax_token_choice exchange_saved": 5,
        "softmax_token_choice full": 8,
        "soft none": 4,
        "soft exchange_saved": 4,
        "soft full": 6,
    }


def compiled() -> tuple[float, int, int]:
    alone = vit("softmax_token_choice", depth=1)
    loss_of(alone, *batch(8)).backward()
    options = {"backend": "aot_eager", "fullgraph": True}
    model = vit("softmax_token_choice", depth=1)
    parallelize(model, Meshes.make("cpu", ep=2), checkpointing="exchange_saved", compile=options)
    for _ in range(2):
        model.zero_grad()
        loss_of(model, *mine(*batch(8))).backward()
    counters = torch._dynamo.utils.counters
    return apart(gradients(model), gradients(alone)), counters["stats"]["unique_graphs"], len(counters["graph_break"])


def test_compiled_checkpointed_block_is_one_graph():
    difference, graphs, breaks = run(2, compiled)[0]
    assert difference < 1e-10
    assert (graphs, breaks) == (1, 0)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = vr.MoEMlp(8, num_experts=4, router="soft")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Stages(nn.Module):
    """Blocks in stages, as in hierarchical models. The second stage has no experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Sequential(nn.LayerNorm(8), Residual(), Residual())
        self.stages = nn.ModuleList([nn.ModuleDict({"layers": first}), nn.ModuleDict({"layers": nn.LayerNorm(8)})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage["layers"](x)
        return x


def stages() -> tuple[list[str], float]:
    x = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    alone, model = Stages().double(), Stages().double()
    alone(x.double()).square().mean().backward()
    parallelize(model, Meshes.make("cpu", ep=2))
    model(mine(x.double())[0]).square().mean().backward()
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
    return units, apart(gradients(model), gradients(alone))


def test_blocks_are_found_in_stages():
    units, difference = run(2, stages)[0]
    assert units == ["", *(f"stages.0.layers.{i}" for i in range(3))]
    assert difference < 1e-10


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.temperature = nn.Parameter(torch.tensor(1.0))


REFUSED = {
    "ddp": "TypeError: parallelize: model must not be wrapped by DistributedDataParallel",
    "no blocks": "ValueError: parallelize: no blocks found in Linear, give the argument blocks",
    "other blocks": "ValueError: parallelize: blocks must be modules of the model, got 1 modules",
    "missing block": "ValueError: parallelize: every MoEMlp must be in one of blocks, got blocks.1.mlp",
    "scalar": "ValueError: parallelize: a parameter must have an axis to be sharded, got the scalar temperature",
    "twice": "ValueError: parallelize: the model must not be sharded yet, but",
    "seed": "ValueError: parallelize: all ranks must have the same values, but",
    "experts": "ValueError: parallelize: blocks.1.mlp: the number of experts must be a multiple of the ep=2 ranks",
    "own experts": "TypeError: parallelize: blocks.1.mlp: experts must be a vmoe_routers.Experts, got ExpertList",
    "checkpointing": "ValueError: parallelize: checkpointing must be one of ('none', 'exchange_saved', 'full')",
    "ranks": "ValueError: Meshes: the number of ranks must be a multiple of replicate * ep = 2 * 2, got 2",
    "ep": "ValueError: Meshes: ep must be an int of at least 1, got 0",
    "torch": "RuntimeError: parallelize: expert parallelism with FSDP2 needs torch 2.12 or later, got",
}


def messages() -> dict[str, str]:
    meshes = Meshes.make("cpu", ep=2)
    found = {}
    for case in REFUSED:
        options: dict[str, Any] = {}
        model: nn.Module = vit("soft", seed=torch.distributed.get_rank() if case == "seed" else 0)
        if case == "ddp":
            model = DistributedDataParallel(model)
        elif case == "no blocks":
            model = nn.Linear(2, 2)
        elif case == "other blocks":
            options["blocks"] = [nn.Linear(2, 2)]
        elif case == "missing block":
            options["blocks"] = [model.blocks[0]]
        elif case == "scalar":
            model = Scalar()
        elif case == "twice":
            parallelize(model, meshes)
        elif case == "experts":
            model = vit("soft", num_experts=3)
        elif case == "own experts":
            model.blocks[1].mlp = vr.MoEMlp(16, experts=[nn.Linear(16, 16) for _ in range(4)], num_experts=4)
        elif case == "checkpointing":
            options["checkpointing"] = "some"
        elif case == "torch":
            del _fsdp_common.ShardPlacementResult
        with pytest.raises(Exception) as caught:
            if case == "ranks":
                Meshes.make("cpu", replicate=2, ep=2)
            elif case == "ep":
                Meshes.make("cpu", ep=0)
            else:
                parallelize(model, meshes, **options)
        found[case] = f"{caught.type.__name__}: {caught.value}"
    return found


def test_refused():
    for found in run(2, messages):
        assert {case: found[case][: len(start)] for case, start in REFUSED.items()} == REFUSED


def test_meshes_need_a_process_group():
    with pytest.raises(RuntimeError, match="Meshes: there is no process group; start with torchrun"):
        Meshes.make("cpu")


def partial_gradient() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(2), mesh, [Replicate()]))
    parameter.grad = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(ValueError) as caught:
        clip_grad_norm_([parameter], 1.0)
    return str(caught.value)


def test_gradients_that_are_no_sums_yet_are_refused():
    assert run(2, partial_gradient)[0].startswith("clip_grad_norm_: the gradients must be sums over the ranks already")
