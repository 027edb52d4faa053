"""parallelize: shards a model over all ranks, by expert parallelism and FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from vmoe_routers.distributed.expert_parallel import ExpertParallel, check_experts
from vmoe_routers.distributed.meshes import Meshes
from vmoe_routers.moe import MoEMlp

Checkpointing = Literal["none", "exchange_saved", "full"]


def parallelize(
    model: nn.Module,
    meshes: Meshes,
    *,
    blocks: Iterable[nn.Module] | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
    reshard_after_forward: bool = True,
    checkpointing: Checkpointing = "none",
    compile: bool | dict[str, Any] = False,
) -> nn.Module:
    """Shards a model over all ranks, in place: expert parallelism, checkpointing, compilation and FSDP2, in this order.

    After ``backward()`` the gradient of every parameter is the mean over all ranks, as in one process over the whole
    batch. Make the optimizer after this call. Clip with `vmoe_routers.distributed.clip_grad_norm_`.

    Every rank must make the model from the same seed, or load the same values.

    Args:
        model: The model, on the CPU or on the device of the rank. It must not be wrapped by DDP.
        meshes: The arrangement of the ranks. With ``ep > 1`` the experts of every `MoEMlp` are distributed.
        blocks: The modules that are gathered, checkpointed and compiled one by one. None: ``model.blocks``. If the
            model has no such attribute: the entries of every nn.Sequential or nn.ModuleList that has a MoE layer in an
            entry.
        param_dtype: Dtype of parameters and inputs in forward and backward, such as torch.bfloat16. None: unchanged.
            Routing computes in float32 from the rounded parameters.
        reduce_dtype: Dtype in which gradients are summed over ranks, if `param_dtype` is given.
        reshard_after_forward: True: the parameters of a block are gathered again in backward, which saves memory.
        checkpointing: "none", "full" or "exchange_saved". With "full" and with "exchange_saved", each block runs again
            in backward. "exchange_saved" keeps the exchanged slots, so that they are not sent again.
        compile: Whether each block is compiled. A dict has arguments of `torch.compile`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError, RuntimeError: The model cannot be sharded. The model is unchanged.
    """
    if checkpointing not in get_args(Checkpointing):
        raise ValueError(f"parallelize: checkpointing must be one of {get_args(Checkpointing)}, got {checkpointing!r}")
    replicated, ep = meshes.expert.size(0) > 1, meshes.expert.size(2)
    placement = _placement(meshes) if ep > 1 else None
    blocks = _checked(model, blocks, ep)
    _check_equal(model, meshes)

    layers = [module for module in model.modules() if isinstance(module, MoEMlp)]
    for layer in layers if ep > 1 else []:
        parallelize_module(layer, meshes.expert["ep"], {"experts": ExpertParallel(average=True)})
    for block in blocks:
        if checkpointing != "none":
            # A wrapper module would change the names of the parameters.
            block.forward = _checkpointed(block.forward, keep_exchanged=checkpointing == "exchange_saved")
        if compile:
            block.compile(**(compile if isinstance(compile, dict) else {}))
    # FSDP2 distinguishes FSDP and HSDP by the number of axes, so a mesh with one replica has one axis.
    mesh = meshes.dense if replicated else meshes.dense["dp_shard"]
    policy = MixedPrecisionPolicy(param_dtype, None if param_dtype is None else reduce_dtype)
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


def _checked(model: nn.Module, blocks: Iterable[nn.Module] | None, ep: int) -> list[nn.Module]:
    """Checks that the model can be sharded, and lists its blocks."""
    if isinstance(model, DistributedDataParallel):
        raise TypeError("parallelize: model must not be wrapped by DistributedDataParallel; give its attribute module")
    blocks = list(_blocks(model) if blocks is None else blocks)
    inside = {module for block in blocks for module in block.modules()}
    if not blocks:
        raise ValueError(f"parallelize: no blocks found in {type(model).__name__}, give the argument blocks")
    if not inside <= set(model.modules()):
        raise ValueError(f"parallelize: blocks must be modules of the model, got {len(blocks)} modules")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(f"parallelize: a parameter must have an axis to be sharded, got the scalar {name}")
        if isinstance(parameter, DTensor):
            raise ValueError(f"parallelize: the model must not be sharded yet, but {name} is a DTensor")
    for name, layer in model.named_modules():
        if isinstance(layer, MoEMlp) and ep > 1:
            check_experts(f"parallelize: {name}", layer.experts, ep)
            if layer not in inside:
                raise ValueError(f"parallelize: every MoEMlp must be in one of blocks, got {name} outside of them")
    return blocks


def _blocks(model: nn.Module) -> Iterable[nn.Module]:
    """Finds the blocks: ``model.blocks``, or the entries of the innermost lists around the MoE layers."""
    blocks = getattr(model, "blocks", None)
    if blocks is not None:
        return blocks
    found: dict[nn.Module, None] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MoEMlp):
            parts = name.split(".")
            around = [model.get_submodule(".".join(parts[:i])) for i in reversed(range(len(parts)))]
            inner = next((module for module in around if isinstance(module, (nn.Sequential, nn.ModuleList))), ())
            found.update(dict.fromkeys(inner))
    return found


def _check_equal(model: nn.Module, meshes: Meshes) -> None:
    """Checks that all ranks have the same values: FSDP2 takes the shard of each rank from that rank's values."""
    state = {name: value for name, value in model.state_dict().items() if not value.is_meta}
    if not state:
        return
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [v.contiguous().flatten().view(bits[v.element_size()]).sum(dtype=torch.int64).cpu() for v in state.values()]
    least = torch.stack(sums).to(meshes.dense.device_type)
    most = least.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    differing = [name for name, differs in zip(state, (least != most).tolist(), strict=True) if differs]
    if differing:
        raise ValueError(
            f"parallelize: all ranks must have the same values, but {len(differing)} tensors differ, {differing[0]} "
            "first; make the model from the same seed on every rank"
        )


def _checkpointed(forward: Callable[..., Any], *, keep_exchanged: bool) -> Callable[..., Any]:
    """Makes a forward that runs again in backward. torch.compile traces functions, not partial applications."""
    context = _keep_exchanged if keep_exchanged else noop_context_fn

    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, context_fn=context, **kwargs)

    return run


def _keep_exchanged() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    exchange = op is torch.ops._c10d_functional.all_to_all_single.default
    return CheckpointPolicy.MUST_SAVE if exchange else CheckpointPolicy.PREFER_RECOMPUTE


def _placement(meshes: Meshes) -> Callable[[nn.Parameter], Any]:
    """Makes the function that puts the experts of a block on their own mesh, within the same unit of FSDP2."""
    try:  # torch has no public name for these classes yet
        from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo, ShardPlacementResult
    except ImportError:
        raise RuntimeError(
            f"parallelize: expert parallelism with FSDP2 needs torch 2.12 or later, got {torch.__version__}"
        ) from None
    if meshes.expert.size(0) > 1:
        info = HSDPMeshInfo(meshes.expert["dp_replicate", "edp"], shard_mesh_dim=1, replicate_mesh_dim=0)
    else:
        info = FSDPMeshInfo(meshes.expert["edp"], shard_mesh_dim=0)

    def place(parameter: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), info) if isinstance(parameter, DTensor) else None

    return place
