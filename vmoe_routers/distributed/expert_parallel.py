"""Expert parallelism: each rank has a part of the experts, and the slots travel to the rank that has their expert."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.parallel import DistributedDataParallel

from vmoe_routers.experts import Experts, ExpertsNorm


def to_experts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sends slots [E, G, ...] of this rank's groups to the ranks of their experts.

    Every rank sends the same number of slots to every rank, because the capacity is static.

    Returns:
        The slots [E / ranks, ranks * G, ...] of this rank's experts.
    """
    x = all_to_all_single_autograd(x.contiguous(), None, None, (mesh, 0))
    return x.unflatten(0, (mesh.size(), -1)).transpose(0, 1).flatten(1, 2)


def to_groups(y: Tensor, mesh: DeviceMesh) -> Tensor:
    """Sends the slots back to the ranks of their groups: the inverse of `to_experts`."""
    y = y.unflatten(1, (mesh.size(), -1)).transpose(0, 1).flatten(0, 1)
    return all_to_all_single_autograd(y.contiguous(), None, None, (mesh, 0))


class ExpertParallel(ParallelStyle):
    """Distributes the experts of a `MoEMlp` over the ranks of a mesh, for `parallelize_module`.

    ``parallelize_module(layer, mesh["ep"], {"experts": ExpertParallel()})``. Every rank routes its own images, sends
    each slot to the rank that has its expert, and gets the result back: one all-to-all each way, without a wait for
    the device. The parameters become DTensors [E, ...], sharded over their first axis. They get the values of rank 0.

    All ranks must call the layer equally often, with equal shapes.

    Args:
        average: False: the gradient of an expert is the sum over the ranks of the mesh. True: it is the mean, as data
            parallelism computes it for every other parameter.

    Raises:
        TypeError: The module is not an `Experts`.
        ValueError: The number of ranks does not divide the number of experts.
    """

    def __init__(self, *, average: bool = False):
        self.average = average

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_experts("ExpertParallel", module, device_mesh.size())
        # torch annotates the two hooks as returning None, and uses their results.
        return distribute_module(module, device_mesh, self._shard, _send, _send_back)  # type: ignore[arg-type]

    def _shard(self, name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        if isinstance(module, (Experts, ExpertsNorm)):
            module.local = partial(_local, 1 / mesh.size() if self.average else 1.0)
        for key, parameter in list(module.named_parameters(recurse=False)):
            sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module.register_parameter(key, nn.Parameter(sharded, parameter.requires_grad))


def check_experts(where: str, experts: nn.Module, ranks: int) -> None:
    """Checks that `ExpertParallel` can distribute the experts over this number of ranks."""
    if not isinstance(experts, Experts):
        raise TypeError(f"{where}: experts must be a vmoe_routers.Experts, got {type(experts).__name__}")
    if experts.num_experts % ranks:
        raise ValueError(
            f"{where}: the number of experts must be a multiple of the ep={ranks} ranks that share them, "
            f"got {experts.num_experts} experts"
        )


def _send(module: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> tuple[Tensor, Tensor | None]:
    """Sends the inputs of `Experts.forward` to the ranks of the experts."""
    if not torch.compiler.is_compiling() and DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "ExpertParallel: the layer is within DistributedDataParallel, which would average each rank's experts as "
            "if they were copies; wrap the model by vmoe_routers.distributed.parallelize instead"
        )
    x, filled = inputs if len(inputs) == 2 else (*inputs, None)
    if filled is not None and x.device.type == "cpu":  # only the CPU's kernel skips empty slots
        return to_experts(x, mesh), to_experts(filled.t(), mesh).t()
    return to_experts(x, mesh), None


def _send_back(module: nn.Module, y: Tensor, mesh: DeviceMesh) -> Tensor:
    return to_groups(y, mesh)


def _local(factor: float, parameter: Any) -> Tensor:
    """Gives this rank's part of a parameter. Backward multiplies the gradient of the parameter by `factor`."""
    part = parameter.to_local()
    return part if factor == 1.0 else cast(Tensor, _ScaleGradient.apply(part, factor))


class _ScaleGradient(torch.autograd.Function):
    """Returns its input. Multiplies the gradient by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.factor, None
