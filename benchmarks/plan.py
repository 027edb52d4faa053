"""What a run measures: its options, and the jobs that follow from them."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.case import Entry, Size
from benchmarks.cases import OPS, entries
from vmoe_routers import _C

ROUNDS = 15
SWEEP = {"experts": (8, 128), "tokens": (49, 256), "width": (192, 768)}
COMPILING = 90.0  # seconds into a quick run on a GPU after which nothing more is compiled


@dataclass(frozen=True)
class Job:
    """One case to be built and measured; `index` is the entry's among those of its op; `default`: of a size that
    targets may be for; `whole`: with all its variants and memory.
    """

    entry: Entry
    index: int
    size: Size
    threads: int
    default: bool
    whole: bool


def parse(arguments: list[str] | None, description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=description)
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--quick", action="store_true", help="small layers, nothing compiled; on a GPU the targets' cases"
    )
    form.add_argument("--full", action="store_true", help="--memory --sweep")
    parser.add_argument("--sweep", action="store_true", help=f"{SWEEP} too, one at a time, where it says something")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--isa", help="the CPU kernels of a lower level: v2, v3 or v4 on x86-64; by default the best")
    parser.add_argument("--threads", type=_threads, help="thread counts, such as 1,2; by default 1")
    parser.add_argument("--only", choices=OPS, help="one op")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of a case, at least {ROUNDS}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--new-memory", action="store_true", help="large results from the system in every call, not from the last one's"
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too, in processes of their own (Linux)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    if options.rounds < ROUNDS:
        parser.error(f"--rounds must be at least {ROUNDS}, got {options.rounds}")
    options.threads = options.threads or [1]
    options.sweep, options.memory = options.sweep or options.full, options.memory or options.full
    options.compile_until = _compile_until(options)
    use_isa(parser, options.isa)
    return options


def _compile_until(options: argparse.Namespace) -> float | None:
    """When torch.compile has had its time; None: it gets none."""
    if options.no_compile or (options.quick and options.device == "cpu"):
        return None
    return time.perf_counter() + COMPILING if options.quick else math.inf


def _threads(text: str) -> list[int]:
    counts = [int(count) for count in text.split(",")] if text.replace(",", "").isdigit() else []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of at least 1 with commas between, got {text!r}")
    return counts


def use_isa(parser: argparse.ArgumentParser, isa: str | None) -> None:
    """Changes to the kernels that were asked for, or ends with a message."""
    if isa is None:
        return
    try:
        _C.use_isa(isa)
    except ValueError:
        parser.error(f"--isa: this CPU, or this build, has no level {isa!r}; the best that it has is {_C.isa()}")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """All cases. The first thread count and the first size have every measurement; a second count and other
    sizes go without the naive forms, torch.compile and memory, so that a full run stays short.
    """
    seen: dict[str, int] = {}
    for entry in entries(options.only, options.device):
        index = seen[entry.op] = seen.get(entry.op, -1) + 1
        job, first = partial(Job, entry, index), options.threads[0]
        if options.device == "cuda":
            sizes = entry.cuda_quick if options.quick else entry.cuda
            for size in sizes:
                yield job(size, first, default=True, whole=size == sizes[0])
        else:
            size = entry.quick if options.quick else entry.default
            for threads in options.threads[:1] if entry.op == "overhead" else options.threads:
                yield job(size, threads, default=size == entry.default, whole=threads == first)
        if options.sweep:
            for part in entry.sweep:
                base = entry.cuda[0] if options.device == "cuda" else entry.default
                for value in SWEEP[part]:
                    size = replace(base, **{part: value})
                    yield job(size, first, default=False, whole=False)
