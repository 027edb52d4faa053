"""Output of a run on the console."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from benchmarks.report.targets import best_peer, reason

WAITS = "Python included"
GPU_TIMES = (
    "Times are by the GPU's clock, for queued calls on the same tensors, so that its L2 cache is warm. The time of a "
    f"call includes Python, which launches one call after another. Variants marked '{WAITS}' synchronise with the GPU, "
    "or have too many kernels to be queued."
)


class TimeLeft:
    """Progress of a run: a bar on a terminal, otherwise a line after every case."""

    def __init__(self, console: Console, weights: Sequence[float]):
        self._weights, self._number = weights, 0
        self._start = time.perf_counter()
        self._console = console
        columns = (BarColumn(), TextColumn("{task.completed} of {task.total} cases, {task.description} left"))
        self._bar = Progress(*columns, console=console, transient=True)
        self._task = self._bar.add_task("?", total=len(weights))

    def __enter__(self) -> TimeLeft:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def done(self) -> None:
        """Counts one more case, and estimates the time left from the weights of the cases."""
        self._number += 1
        took = (time.perf_counter() - self._start) / sum(self._weights[: self._number])
        left = f"{took * sum(self._weights[self._number :]) / 60:.1f} min"
        self._bar.update(self._task, advance=1, description=left)
        if not self._console.is_terminal:
            self._console.print(f"[{self._number} of {len(self._weights)} cases, {left} left]", markup=False)


def seconds(value: float) -> str:
    """Formats seconds with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.3g}"


def memory_of_results(machine: dict) -> str:
    """Describes whether freed memory was reused."""
    return "freed memory is kept" if machine["memory_kept"] else "large results are new memory"


def print_machine(console: Console, machine: dict, ceilings: list[dict]) -> None:
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    on_cpu = f"{machine['cores']} cores, ISA {machine['isa']}, {memory_of_results(machine)}, "
    cpu = on_cpu if machine["device"] == "cpu" else ""
    console.print(f"{machine['name']}, {cpu}{machine['date']}; {packages}")
    for found in ceilings:
        rates = found["ceilings"]
        read = ", ".join(f"{level} {rate / 1e9:.3g}" for level, rate in rates["read"].items())
        copy = ", ".join(f"{level} {rate / 1e9:.3g}" for level, rate in rates["copy"].items())
        bfloat16 = f", bfloat16 8192^3 {rates['gemm_bfloat16'] / 1e9:.4g}" if rates["gemm_bfloat16"] else ""
        console.print(
            f"Ceilings, {found['threads']} thread(s): GEMM 2048^3 {rates['gemm'] / 1e9:.4g} GFLOP/s, "
            f"at the layer's shape {rates['gemm_layer'] / 1e9:.4g}{bfloat16}; read {read} GB/s; "
            f"copy {copy} GB/s (both ways); exp {rates['exp'] / 1e9:.3g} G/s"
        )
    if machine["device"] == "cuda":
        console.print(GPU_TIMES)


def print_result(console: Console, result: dict) -> None:
    """Prints the table of one case in one direction."""
    floor = result["floor"]
    # No brackets: rich reads them as markup.
    head = f"{result['title']}, {result['direction']}  ({result['size']}, {result['threads']} thread(s))"
    again = result["again"]
    mark = "  [bold red]UNSTABLE[/]" if result["unstable"] else ""
    console.print(f"\n[bold]{head}[/]", highlight=False)
    on_gpu = any(v["called_seconds"] for v in result["variants"])
    names = ["variant", "time", *(["of a call"] if on_gpu else []), "time / ours", "95 %", "floor / time"]
    table = Table(*names, "saved MiB", "peak MiB", "", box=None, pad_edge=False)
    for column in table.columns[1:-1]:
        column.justify = "right"
    best = best_peer(result)
    for v in result["variants"]:
        notes = [f"different function: {v['different']}"] if v["different"] else []
        notes += [WAITS] if v["waits"] else []
        notes += ["best peer"] if v["name"] == best else []
        table.add_row(
            escape(v["name"]),
            seconds(v["seconds"]),
            *([seconds(v["called_seconds"])] if on_gpu else []),
            f"{v['ratio']['median']:.2f}",
            f"{v['ratio']['low']:.2f}-{v['ratio']['high']:.2f}",
            f"{floor['seconds'] / v['seconds']:.2%}",
            mebibytes(v["saved_bytes"]),
            mebibytes(v["peak_bytes"]),
            escape("; ".join(notes)),
        )
    console.print(table)
    console.print(
        f"floor {seconds(floor['seconds'])} ({floor['by']}); A/A {again['median']:.3f} "
        f"({again['low']:.3f}-{again['high']:.3f}){mark}; results agree within {result['tolerance']:g}"
        + (f", except {result['allowed']:.1%} of the entries" if result["allowed"] else ""),
        highlight=False,
    )
    for line in result["skipped"]:
        console.print(f"[yellow]skipped[/] {escape(line)}", highlight=False)


def print_verdicts(console: Console, verdicts: list[dict]) -> None:
    if not verdicts:
        return
    console.print("\n[bold]Targets[/] (time or memory of the variant over ours, or the unit in 'against')")
    table = Table("case", "size", "thr", "against", "target", "reached", "", "why", box=None, pad_edge=False)
    for v in sorted(verdicts, key=lambda v: v["factor"]):
        verdict = "[green]met[/]" if v["factor"] >= 1 else "[red]missed[/]"
        table.add_row(
            f"{v['title']}, {v['direction']}",
            v["size"],
            str(v["threads"]),
            v["against"],
            f"{v['target']:.3g}",
            f"{v['ratio']:.3g}",
            f"{verdict}, {v['factor']:.2f} of it" + (" [bold red]UNSTABLE[/]" if v["unstable"] else ""),
            escape(reason(v)),
        )
    console.print(table)
