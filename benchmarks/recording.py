"""Cost of recording a layer's routing: `python -m benchmarks.recording [--rounds N]`.

Prints the milliseconds of CPU time of a forward, for one layer of every router (D = 384, E = 32, T = 196, 8 images).
Prints the ratios of three further forwards to this time: outside `record` after a recording, within `record`, and
within `record` with all statistics. All forwards are measured in the same rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.timer import Ratio, paired
from vmoe_routers import ROUTERS, MoEMlp, inspect

CALLS = ("after recording", "recorded", "with statistics")


def cpu_seconds(call: Callable[[], object]) -> float:
    """Returns the CPU time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def recorded(layer: MoEMlp, x: Tensor, statistics: bool) -> None:
    with inspect.record(layer) as trace:
        layer(x)
    if statistics:
        trace.to_dict()


@torch.no_grad()
def plain(layer: MoEMlp, x: Tensor) -> None:
    layer(x)


def measure(router: str, rounds: int, width: int = 384, images: int = 8) -> tuple[float, list[Ratio]]:
    """Returns the seconds of a forward, and the ratios of the times of `CALLS` to these seconds."""
    torch.manual_seed(0)
    layer = MoEMlp(width, num_experts=32, router=router).eval()
    x = torch.randn(images, 196, width)
    calls = {
        "forward": partial(plain, layer, x),
        "after recording": partial(plain, layer, x),
        "recorded": partial(recorded, layer, x, False),
        "with statistics": partial(recorded, layer, x, True),
    }
    for call in calls.values():
        call()
    timings, _ = paired({name: partial(cpu_seconds, call) for name, call in calls.items()}, rounds=rounds)
    return timings["forward"].seconds, [timings[name].ratio for name in CALLS]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recording", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--rounds", type=int, default=31, help="measurements of a layer, by default 31")
    rounds = parser.parse_args(arguments).rounds
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    torch.set_num_threads(1)
    table = Table("layer", "forward, ms", *CALLS, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for router in ROUTERS:
        seconds, ratios = measure(router, rounds)
        shown = (f"{ratio.median:.3f} ({ratio.low:.3f}-{ratio.high:.3f})" for ratio in ratios)
        table.add_row(router, f"{1e3 * seconds:.2f}", *shown)
    (Console() if Console().is_terminal else Console(width=160)).print(table)


if __name__ == "__main__":
    main()
