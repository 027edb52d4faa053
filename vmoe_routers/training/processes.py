"""Processes of a training: one process, or the processes that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from vmoe_routers.options import OptionError


@dataclass(frozen=True)
class World:
    """This process among the processes of a training.

    Attributes:
        rank: the number of this process.
        size: number of processes.
        device: the device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this process writes the files and the console."""
        return self.rank == 0

    def mean(self, x: Tensor) -> Tensor:
        """Computes the mean over the processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
            x /= self.size
        return x

    def barrier(self) -> None:
        """Waits for all processes."""
        if self.size > 1:
            dist.barrier()

    def any(self, value: bool) -> bool:
        """Tells whether the value is true in at least one process."""
        if self.size == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


class Vote:
    """Asks all processes in every step whether a value is true in at least one of them.

    The answer comes one step later, so that no process waits for the slowest one. If the default group has a backend
    for the CPU, as the group of `processes` has, the flags are on the CPU, so that no process waits for its device.

    Args:
        world: The processes.
    """

    def __init__(self, world: World):
        self._world = world
        is_on_cpu = world.size > 1 and "cpu:" in dist.get_backend_config()
        self._device = torch.device("cpu") if is_on_cpu else world.device
        self._previous: tuple[Tensor, Any] | None = None

    def __call__(self, value: bool) -> bool:
        """Tells whether `value` was true in at least one process in the previous call; with one process, in this call.

        Every process must make the same number of calls.
        """
        if self._world.size == 1:
            return value
        flag = torch.tensor(int(value), device=self._device)
        previous = self._previous
        self._previous = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        if previous is None:
            return False
        flag, work = previous
        work.wait()
        return bool(flag)


@contextmanager
def processes(device: str) -> Iterator[World]:
    """Joins the processes that torchrun started. Without torchrun, there is one process.

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        OptionError: The device is unknown, or "cuda" without a CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', got {device!r}", "device")
    if device == "cuda" and not torch.cuda.is_available():
        raise OptionError("device 'cuda': torch finds no CUDA device; auto or cpu runs here", "device")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    local = int(os.environ.get("LOCAL_RANK", 0))
    place = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(place)
    starts = "TORCHELASTIC_RUN_ID" in os.environ and not dist.is_initialized()
    if starts:
        store, rank, size = next(rendezvous("env://"))
        # torchrun's store keeps the addresses of earlier groups, from before a restart and from earlier calls.
        restart = os.environ["TORCHELASTIC_RESTART_COUNT"]
        number = store.add(f"vmoe_routers: groups of rank {rank}, restart {restart}", 1)
        store = PrefixStore(f"restart {restart}, group {number}", store)
        device_id = place if kind == "cuda" else None
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"  # gloo for `Vote`
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, device_id=device_id)
    is_many = dist.is_initialized()
    try:
        yield World(dist.get_rank() if is_many else 0, dist.get_world_size() if is_many else 1, place)
    finally:
        if starts:
            dist.destroy_process_group()
