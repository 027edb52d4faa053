"""Growth of the time of each op: `python -m benchmarks.scaling [--csv FILE] [--isa v3] [--only OP]`.

Measures the time over tokens, experts and groups, with one and two threads in turns, in one process. Fits a log-log
line through the larger half of the points, and compares its slope with the exponent of the algorithm.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.case import FORWARD, Case, Entry, Size
from benchmarks.cases import OPS, entries
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.compare import recording, runner
from benchmarks.kept import read_table, write_table
from benchmarks.machine import keep_memory, machine
from benchmarks.plan import use_isa
from benchmarks.report.console import TimeLeft, seconds
from benchmarks.timer import is_unstable, measure, once

THREADS = (1, 2)
BYTES, FLOPS = 1 << 30, 1e11  # a point that moves more bytes or computes more FLOPs is left out
SLACK = 0.15  # a slope is too steep if it exceeds the algorithm's exponent by more than SLACK
GAIN = 1.7  # wanted speedup of two threads over one, if arithmetic sets the floor and not memory
LONG = 0.25  # seconds; a longer call gets fewer rounds
LEAVE_OUT = ("layer", "overhead")


@dataclass(frozen=True)
class Axis:
    """A number that grows, such as the tokens: its name, its values, and the size of the case for each value."""

    name: str
    values: tuple[int, ...]
    size: Callable[[int], Size]


AXES = (
    Axis("tokens", (1_000, 3_000, 10_000, 30_000, 100_000, 200_000), lambda n: Size(1, n, 32, 64)),
    Axis("experts", (8, 32, 128, 512, 2048, 4096), lambda E: Size(1, 3136, E, 64)),
    Axis("groups", (1, 4, 16, 64, 256, 1024), lambda G: Size(G, 49, 32, 64)),
)


def expected(op: str, axis: str) -> float:
    """Returns the exponent of the algorithm along an axis."""
    if op == "soft_mix":  # as many slots as tokens
        return {"tokens": 2.0, "experts": 0.0, "groups": 1.0}[axis]
    if axis == "experts" and op in ("assign_slots", "invert_slots", "dispatch"):
        return 0.0  # the number of slots does not change
    return 1.0


def chosen(axis: Axis, only: str | None) -> list[Entry]:
    """Returns one entry per op: for the axis "groups" the entry per image, otherwise the entry of one group."""
    found: dict[str, Entry] = {}
    for entry in entries(only):
        if entry.op in LEAVE_OUT:
            continue
        one_group = getattr(entry.build, "keywords", {}).get("one_group")
        if entry.op not in found or one_group == (axis.name != "groups"):
            found[entry.op] = entry
    return list(found.values())


def by_threads(case: Case) -> dict[str, Callable[[], object]]:
    """Returns the forward of our variant for each number of threads."""
    call = runner(case.variants[0], FORWARD)

    def with_threads(threads: int):
        def run():
            torch.set_num_threads(threads)
            return call()

        return run

    return {str(threads): with_threads(threads) for threads in THREADS}


def point(entry: Entry, size: Size, rounds: int) -> dict | None:
    """Measures seconds with each number of threads and the speedup. Returns None if the case is too large."""
    torch.manual_seed(0)
    case = entry.build(size, "cpu")
    if case.floors[FORWARD].bytes > BYTES or case.floors[FORWARD].flops > FLOPS:
        return None
    calls = by_threads(case)
    with recording(FORWARD):
        if once(calls[str(THREADS[0])], 1, "cpu") > LONG:
            rounds = min(rounds, 5)  # long calls vary little, and more rounds would take minutes
        timings, again = measure(calls, rounds=rounds)
    ratio = timings[str(THREADS[-1])].ratio
    return {
        "title": case.title,
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "gain": {"median": 1 / ratio.median, "low": 1 / ratio.high, "high": 1 / ratio.low},
        "unstable": is_unstable(again),
    }


def slope(xs: list[float], ys: list[float]) -> float:
    """Returns the slope of the log-log line through the larger half of the points."""
    half = len(xs) // 2 if len(xs) > 3 else 0
    return float(np.polyfit(np.log(xs[half:]), np.log(ys[half:]), 1)[0])


def curve(op: str, axis: str, points: list[dict]) -> dict:
    """Returns the points of one op along an axis, with the slope of its time for each number of threads."""
    xs = [p["x"] for p in points]
    return {
        "op": op,
        "title": points[0]["title"],
        "axis": axis,
        "points": points,
        "slope": {str(n): slope(xs, [p["seconds"][str(n)] for p in points]) for n in THREADS},
        "expected": expected(op, axis),
        "unstable": any(p["unstable"] for p in points),
    }


def measure_curve(entry: Entry, axis: Axis, rounds: int) -> dict:
    found = [(value, point(entry, axis.size(value), rounds)) for value in axis.values]
    return curve(entry.op, axis.name, [{"x": value, **p} for value, p in found if p is not None])


def gains(found: Ceilings, only: str | None, rounds: int) -> list[dict]:
    """Measures the speedup of two threads over one for every case at its default size."""
    rows = []
    for entry in entries(only):
        if entry.op == "overhead":
            continue
        torch.manual_seed(0)
        case = entry.build(entry.default, "cpu")
        by = found.floor(case.floors[FORWARD])["by"]
        with recording(FORWARD):
            timings, again = measure(by_threads(case), rounds=rounds)
        ratio = timings[str(THREADS[-1])].ratio
        rows.append(
            {
                "op": entry.op,
                "title": case.title,
                "size": str(case.size),
                "by": by,
                "seconds": {name: timing.seconds for name, timing in timings.items()},
                "gain": {"median": 1 / ratio.median, "low": 1 / ratio.high, "high": 1 / ratio.low},
                "unstable": is_unstable(again),
            }
        )
    return rows


def is_compute_bound(gain: dict) -> bool:
    """Tells whether arithmetic sets the floor. If so, two threads should reach the speedup `GAIN`."""
    return "bandwidth" not in gain["by"]


COLUMNS = ("op", "title", "axis", "x", "size", "by", "seconds_1", "seconds_2", "median", "low", "high", "unstable")


def write_scaling(report: dict, path: Path) -> None:
    """Writes a row per point of a curve, and a row without an axis per case at its default size."""

    def row(found: dict, **more: object) -> dict:
        seconds = {f"seconds_{n}": time for n, time in found["seconds"].items()}
        same = {name: found[name] for name in ("title", "unstable")}
        return {**same, **seconds, **found["gain"], **more}

    rows = [row(p, op=c["op"], axis=c["axis"], x=p["x"]) for c in report["curves"] for p in c["points"]]
    rows += [row(g, op=g["op"], size=g["size"], by=g["by"]) for g in report["gains"]]
    about = {key: value for key, value in report.items() if key not in ("curves", "gains")}
    write_table(path, about, COLUMNS, rows)


def read_scaling(path: Path) -> dict:
    """Reads a file of `write_scaling`."""
    about, rows = read_table(path)
    found = [
        {
            **{name: row[name] for name in ("op", "title", "axis", "x", "size", "by")},
            "seconds": {str(n): row[f"seconds_{n}"] for n in THREADS},
            "gain": {name: row[name] for name in ("median", "low", "high")},
            "unstable": bool(row["unstable"]),
        }
        for row in rows
    ]
    points = groupby((f for f in found if f["axis"]), lambda f: (f["op"], f["axis"]))
    curves = [curve(op, axis, list(group)) for (op, axis), group in points]
    return {**about, "curves": curves, "gains": [f for f in found if not f["axis"]]}


def print_curves(console: Console, report: dict) -> None:
    for axis in AXES:
        table = Table("op", "slope, 1 thr", "2 thr", "algorithm", "", "smallest", "largest", box=None, pad_edge=False)
        for c in (c for c in report["curves"] if c["axis"] == axis.name):
            first, last = c["points"][0], c["points"][-1]
            ends = [f"{p['x']}: {seconds(p['seconds']['1'])}, {seconds(p['seconds']['2'])}" for p in (first, last)]
            verdict = "[green]not steeper[/]" if c["slope"]["1"] <= c["expected"] + SLACK else "[red]steeper[/]"
            verdict += " [bold red]UNSTABLE[/]" if c["unstable"] else ""
            table.add_row(c["title"], *(f"{s:.2f}" for s in c["slope"].values()), f"{c['expected']:g}", verdict, *ends)
        console.print(f"\n[bold]Time against {axis.name}[/] (times with 1 and 2 threads)")
        console.print(table)
    console.print(f"\n[bold]Two threads over one[/] (target: at least {GAIN}, if arithmetic sets the floor)")
    table = Table("case", "size", "floor by", "gain", "95 %", "", box=None, pad_edge=False)
    for row in report["gains"]:
        gain, verdict = row["gain"], ""
        if is_compute_bound(row):
            reached = gain["median"] / GAIN
            verdict = f"{'[green]met[/]' if reached >= 1 else '[red]missed[/]'}, {reached:.2f} of it"
        verdict += " [bold red]UNSTABLE[/]" if row["unstable"] else ""
        interval = f"{gain['low']:.2f}-{gain['high']:.2f}"
        table.add_row(row["title"], row["size"], row["by"], f"{gain['median']:.2f}", interval, verdict)
    console.print(table)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").split(":")[0])
    parser.add_argument("--isa", help="ISA level of the CPU kernels: v2, v3 or v4 on x86-64; by default the best")
    parser.add_argument("--only", choices=[op for op in OPS if op not in LEAVE_OUT], help="one op")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per point")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the results")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    use_isa(parser, options.isa)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    console = Console() if Console().is_terminal else Console(width=160)
    start = time.perf_counter()
    torch.set_num_threads(THREADS[0])
    found = measure_ceilings("cpu", quick=True)
    report: dict = {"machine": machine("cpu", memory_kept=keep_memory()), "ceilings": asdict(found), "curves": []}
    plan = [(axis, entry) for axis in AXES for entry in chosen(axis, options.only)]
    with TimeLeft(console, [1] * len(plan)) as left:
        for axis, entry in plan:
            report["curves"].append(measure_curve(entry, axis, options.rounds))
            left.done()
    report["gains"] = gains(found, options.only, options.rounds)
    report["seconds"] = time.perf_counter() - start
    print_curves(console, report)
    if options.csv:
        write_scaling(report, options.csv)
        console.print(f"\nwritten: {options.csv}")
    console.print(f"{report['seconds']:.0f} s")


if __name__ == "__main__":
    main()
