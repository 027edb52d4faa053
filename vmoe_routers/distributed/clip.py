"""clip_grad_norm_ for gradients on any number of meshes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Clips the norm of all gradients together, as `torch.nn.utils.clip_grad_norm_` does in one process.

    The gradients may be plain tensors (one process, or DDP), DTensors of FSDP2, and DTensors of expert parallelism,
    which are on another mesh. torch's function refuses several meshes. If a parameter is a DTensor, all ranks of the
    default process group must call this function. The function needs one all-reduce of a scalar.

    Args:
        parameters: The parameters. Parameters without a gradient are skipped.
        max_norm: The norm to which a larger gradient is scaled.
        norm_type: p of the p-norm, a positive number or infinity.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        ValueError: A gradient is a sum over ranks that has not been computed yet (placement Partial).
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not any(hasattr(parameter, "to_local") for parameter in parameters):
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)
    by_copies: dict[int, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_copies.setdefault(_copies(parameter.grad), []).append(local(parameter.grad))
    grads = [grad for same in by_copies.values() for grad in same]
    dtype = torch.float32
    for grad in grads:
        dtype = torch.promote_types(dtype, grad.dtype)
    total = torch.zeros((), dtype=dtype, device=local(parameters[0]).device)
    infinite = math.isinf(norm_type)
    for copies, same in by_copies.items():
        # If a parameter has fewer rows than there are ranks, some ranks have no rows of it.
        norm = get_total_norm([grad for grad in same if grad.numel()], norm_type).to(total)
        total = torch.maximum(total, norm) if infinite else total + norm**norm_type / copies
    dist.all_reduce(total, dist.ReduceOp.MAX if infinite else dist.ReduceOp.SUM)
    if not infinite:
        total = total ** (1 / norm_type)
    if grads:
        torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))  # type: ignore[attr-defined]
    return total


def local(tensor: Tensor) -> Tensor:
    """Gives the part of a tensor that this rank has. The part of a DTensor shares its memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[attr-defined]


def _copies(grad: Any) -> int:
    """Counts the ranks that have the same part of a gradient."""
    copies = dist.get_world_size()
    if hasattr(grad, "to_local"):
        for extent, placement in zip(grad.device_mesh.shape, grad.placements, strict=True):
            if placement.is_partial():
                raise ValueError(
                    f"clip_grad_norm_: the gradients must be sums over the ranks already, got {placement} on the mesh "
                    f"{grad.device_mesh.mesh_dim_names}"
                )
            copies //= 1 if placement.is_replicate() else extent
    return copies
