"""Runs a function on several ranks: processes with a gloo group, forked from a server that has imported everything.

A check gets fresh processes, which take a tenth of a second, so a failed check leaves nothing to later checks.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 300
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.checkpoint", "timm.task", "vmoe_routers.training", "vmoe_routers.distributed"]
)


def run(world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Runs `function` on ranks 0 .. world - 1; world 0: in one process without a group.

    Starts once more if gloo fails to connect the ranks, as it sometimes does on a busy machine ("Connection closed by
    peer").

    Returns:
        The result of each rank.

    Raises:
        AssertionError: A rank raised an error or died; the message has the traceback.
    """
    try:
        return _run(world, function, args)
    except AssertionError as error:
        if "connectFullMesh failed" not in str(error):
            raise
    return _run(world, function, args)


def _run(world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(max(world, 1)):
            here, there = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_rank, args=(there, str(Path(folder) / "store"), rank, world, function, args)
            )
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        try:
            return _collect(pipes)
        finally:
            for process in processes:
                process.join(0.5)
                process.kill()
                process.join()


def _collect(pipes: list[Any]) -> list[Any]:
    results: dict[int, Any] = {}
    errors: list[str] = []
    end = time.monotonic() + SECONDS
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, end - time.monotonic()))
        if not ready:
            errors.append(f"ranks {[pipes.index(pipe) for pipe in waiting]} did not end in time")
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                error, results[rank] = pipe.recv()
            except EOFError:
                error, results[rank] = "the process died", None
            if error is not None:
                errors.append(f"rank {rank}: {error}")
                end = min(end, time.monotonic() + 3)  # the other ranks may wait for this rank, or report more
    assert not errors, "\n".join(errors)
    return [results[rank] for rank in range(len(pipes))]


def _rank(pipe: Any, store: str, rank: int, world: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch.compile
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    try:
        if world:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=SECONDS),
            )
        result = function(*args)
        if world:
            dist.barrier()  # an earlier end of a rank would close connections that a slower rank still opens
            dist.destroy_process_group()
        pipe.send((None, result))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
