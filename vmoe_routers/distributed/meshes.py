"""Meshes: the arrangement of all ranks for data parallelism and for expert parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Meshes:
    """All ranks, arranged twice in the same order: ``world = replicate * edp * ep``.

    Attributes:
        dense: ("dp_replicate", "dp_shard") for all parameters but the experts, with dp_shard = edp * ep.
        expert: ("dp_replicate", "edp", "ep") for the experts: distributed over "ep", then sharded over "edp".
    """

    dense: DeviceMesh
    expert: DeviceMesh

    @classmethod
    def make(cls, device_type: str | None = None, *, replicate: int = 1, ep: int = 1) -> Meshes:
        """Arranges the ranks of the default process group.

        Args:
            device_type: "cuda", "cpu", ... By default the accelerator of this machine, else "cpu".
            replicate: Copies of the sharded model. 1: FSDP over all ranks.
            ep: Ranks among which the experts of a layer are distributed. Neighbouring ranks share the experts of a
                layer, so choose a divisor of the number of devices of a node.

        Raises:
            RuntimeError: There is no process group.
            ValueError: replicate * ep does not divide the number of ranks.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                "Meshes: there is no process group; start with torchrun, and call torch.distributed.init_process_group"
            )
        for name, value in (("replicate", replicate), ("ep", ep)):
            if type(value) is not int or value < 1:
                raise ValueError(f"Meshes: {name} must be an int of at least 1, got {value!r}")
        world = dist.get_world_size()
        if world % (replicate * ep):
            raise ValueError(
                f"Meshes: the number of ranks must be a multiple of replicate * ep = {replicate} * {ep}, got {world}"
            )
        if device_type is None:
            accelerator = torch.accelerator.current_accelerator(check_available=True)
            device_type = "cpu" if accelerator is None else accelerator.type
        shard = world // replicate
        return cls(
            init_device_mesh(device_type, (replicate, shard), mesh_dim_names=("dp_replicate", "dp_shard")),
            init_device_mesh(device_type, (replicate, shard // ep, ep), mesh_dim_names=("dp_replicate", "edp", "ep")),
        )
