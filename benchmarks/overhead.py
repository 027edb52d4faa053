"""Call overhead of a whole tiny layer of every router: `python -m benchmarks.overhead [--rounds N]`.

Tensors are so small that the calls take the time, not the arithmetic. Prints microseconds of CPU time per call, and the
ratio to a dense MLP measured in the same rounds. Also prints how many Python functions of the package a call runs, and
how many of these functions check arguments. CPU time depends little on other processes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import vmoe_routers
from benchmarks.cases.overhead import TINY_LAYER, tiny_layers
from benchmarks.timer import paired

PACKAGE = str(Path(vmoe_routers.__file__).parent)
REPEATS = 20  # calls per measurement: a measurement must be shorter than the time slice of a process


def cpu_seconds(call: Callable[[], object]) -> float:
    """Returns the CPU time of one call: the mean of `REPEATS` calls."""
    start = time.process_time()
    for _ in range(REPEATS):
        call()
    return (time.process_time() - start) / REPEATS


def python_calls(call: Callable[[], object]) -> tuple[int, int]:
    """Counts the Python functions of the package that one call runs: all functions, and checks alone.

    A check is a function named `check...` or `_check...`, or a method of a class `Check`.
    """
    every = checks = 0

    def count(frame, event, argument):
        nonlocal every, checks
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            every += 1
            owner = getattr(code, "co_qualname", "").split(".")[0]  # Python 3.11
            checks += code.co_name.lstrip("_").startswith("check") or owner == "Check"

    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(None)
    return every, checks


def forward(module: nn.Module, x: Tensor) -> None:
    """Runs a forward without a graph."""
    with torch.no_grad():
        module(x)


def forward_backward(module: nn.Module, x: Tensor) -> None:
    """Runs a forward, and a backward of the output."""
    torch.autograd.grad(module(x).sum(), (x, *module.parameters()))


def training_step(module: nn.Module, x: Tensor) -> None:
    """Runs a forward, and a backward of the output and of the auxiliary loss."""
    loss = module(x).sum() + vmoe_routers.aux_loss(module)
    torch.autograd.grad(loss, (x, *module.parameters()))


# Training mode and function, by name of the call.
CALLS = {
    "forward": (False, forward),
    "forward + backward": (False, forward_backward),
    "training, with aux_loss": (True, training_step),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--rounds", type=int, default=31, help="measurements of a layer, by default 31")
    rounds = parser.parse_args(arguments).rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    torch.set_num_threads(1)
    columns = ("layer", "call", "us, median", "us, fastest", "time / dense MLP", "Python calls", "checks")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for router in vmoe_routers.ROUTERS:
        torch.manual_seed(0)
        layer, dense, x = tiny_layers(TINY_LAYER, "cpu", router)
        for name, (training, call) in CALLS.items():
            layer.train(training)
            # The first call is the base of the ratios.
            calls = {"dense": partial(call, dense, x), "layer": partial(call, layer, x)}
            for once in calls.values():
                cpu_seconds(once)  # warms up
            timings, _ = paired({name: partial(cpu_seconds, once) for name, once in calls.items()}, rounds=rounds)
            timing = timings["layer"]
            table.add_row(
                router,
                name,
                f"{1e6 * timing.seconds:.1f}",
                f"{1e6 * timing.fastest:.1f}",
                f"{timing.ratio.median:.2f} ({timing.ratio.low:.2f}-{timing.ratio.high:.2f})",
                *map(str, python_calls(calls["layer"])),
            )
    (Console() if Console().is_terminal else Console(width=160)).print(table)


if __name__ == "__main__":
    main()
