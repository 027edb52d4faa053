"""Options of a run, and its list of jobs."""

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
COMPILING = 90.0  # seconds after the start of a quick run on a GPU; cases that start later are not compiled


@dataclass(frozen=True)
class Job:
    """One case to build and measure.

    Attributes:
        entry: Recipe of the case.
        index: Place of the entry among the entries of its op.
        size: Sizes of the inputs.
        threads: Number of threads.
        default: Whether targets may apply to the size.
        whole: Whether to measure all variants, torch.compile and memory.
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
        "--quick", action="store_true", help="small sizes, without torch.compile; on a GPU, the cases that have targets"
    )
    form.add_argument("--full", action="store_true", help="means --memory --sweep")
    parser.add_argument("--sweep", action="store_true", help=f"also other sizes, one change at a time: {SWEEP}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--isa", help="ISA level of the CPU kernels: v2, v3 or v4 on x86-64; by default the best")
    parser.add_argument("--threads", type=_threads, help="thread counts, for example 1,2; by default 1")
    parser.add_argument("--only", choices=OPS, help="one op")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds per case, at least {ROUNDS}")
    parser.add_argument("--no-compile", action="store_true", help="do not measure torch.compile")
    parser.add_argument("--new-memory", action="store_true", help="do not reuse freed memory for large results")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, in separate processes (Linux)")
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
    """Returns the time until which cases are compiled; None if no case is compiled."""
    if options.no_compile or (options.quick and options.device == "cpu"):
        return None
    return time.perf_counter() + COMPILING if options.quick else math.inf


def _threads(text: str) -> list[int]:
    counts = [int(count) for count in text.split(",")] if text.replace(",", "").isdigit() else []
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers of at least 1 with commas between, got {text!r}")
    return counts


def use_isa(parser: argparse.ArgumentParser, isa: str | None) -> None:
    """Switches to the kernels of an ISA level. An unknown level ends the program with a message."""
    if isa is None:
        return
    try:
        _C.use_isa(isa)
    except ValueError:
        parser.error(f"--isa: this CPU, or this build, has no level {isa!r}; its best level is {_C.isa()}")


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Lists all jobs of a run.

    The first thread count and the first size get every measurement. Other thread counts and sizes omit the naive forms,
    torch.compile and memory, so that a full run stays short.
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
