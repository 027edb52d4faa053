"""The benchmark: `python -m benchmarks.run [--quick] [--device cpu] [--threads 1,2] [--only OP] [--json FILE]`.

Measures the machine's ceilings, then every case: correctness first, then all variants of the case in one process and
in shuffled rounds, as ratios to ours. Prints tables and writes JSON with figures beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.case import BACKWARD, Case, Entry, Floor, Size, Variant
from benchmarks.cases import OPS, entries
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.compare import check, runner
from benchmarks.machine import machine
from benchmarks.memory import peak_in_child, saved_bytes
from benchmarks.report import print_machine, print_result, print_verdicts
from benchmarks.targets import verdicts
from benchmarks.timer import is_unstable, measure

ROUNDS = 15
SWEEP = {"experts": (8, 128), "tokens": (49, 256), "width": (192, 768)}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small layers, one thread count, nothing compiled")
    parser.add_argument("--sweep", action="store_true", help=f"the default sizes and {SWEEP}, one changed at a time")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", default="1", help="thread counts, such as 1,2")
    parser.add_argument("--only", choices=OPS, help="one op")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds of a case, at least {ROUNDS}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--memory", action="store_true", help="peak memory too, by a child process each (Linux)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results, and figures beside them")
    options = parser.parse_args(arguments)
    if options.rounds < ROUNDS:
        parser.error(f"--rounds must be at least {ROUNDS}, got {options.rounds}")
    try:
        options.threads = [int(count) for count in options.threads.split(",")]
    except ValueError:
        parser.error(f"--threads must be numbers with commas between, got {options.threads!r}")
    return options


def sizes(entry: Entry, options: argparse.Namespace) -> Iterator[Size]:
    yield entry.quick if options.quick else entry.default
    if options.sweep:
        for name, values in SWEEP.items():
            yield from (replace(entry.default, **{name: value}) for value in values)


def with_compiled(case: Case) -> Case:
    """The case with torch.compile of its index forms."""
    torch.compiler.reset()
    compiled = [
        replace(v, name=f"torch.compile of {v.name}", role="compiled", call=torch.compile(v.call))
        for v in case.variants
        if v.role == "index"
    ]
    return case.with_variants((*case.variants, *compiled))


def usable(case: Case, direction: str, skipped: list[str]) -> list[Variant]:
    """The variants that compute what they should. A wrong one of ours or of torch's forms is an error of the run."""
    kept = []
    for variant in case.variants:
        if direction == BACKWARD and (variant.forward_only or not variant.leaves):
            continue
        try:
            check(case, variant, direction)
            runner(variant, direction)()
        except Exception as error:
            if variant.role != "compiled":
                raise
            skipped.append(f"{variant.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        kept.append(variant)
    return kept


def measure_case(
    case: Case, direction: str, threads: int, ceilings: Ceilings, options: argparse.Namespace, place: tuple[int, Entry]
) -> dict:
    """One row of results: times, ratios, fractions of the floor, memory."""
    skipped = list(case.skipped)
    variants = usable(case, direction, skipped)
    calls = {variant.name: runner(variant, direction) for variant in variants}
    timings, again = measure(calls, rounds=options.rounds, device=options.device)

    def peak(variant: Variant) -> int | None:
        if not options.memory or options.device != "cpu" or variant.role == "compiled":
            return None
        return peak_in_child(case.op, place[0], variant.name, asdict(case.size), threads, direction)

    return {
        "op": case.op,
        "title": case.title,
        "size": str(case.size),
        "direction": direction,
        "threads": threads,
        "tolerance": case.tolerance,
        "allowed": case.allowed,
        "floor": ceilings.floor(case.floors[direction]),
        "again": asdict(again),
        "unstable": is_unstable(again),
        "skipped": skipped,
        "variants": [
            {
                "name": v.name,
                "role": v.role,
                "different": v.different or (v.different_gradient if direction == BACKWARD else ""),
                "seconds": timings[v.name].seconds,
                "ratio": asdict(timings[v.name].ratio),
                "saved_bytes": saved_bytes(v) if direction == BACKWARD and v.role != "compiled" else None,
                "peak_bytes": peak(v),
            }
            for v in variants
        ],
    }


def run(options: argparse.Namespace, console: Console) -> dict:
    """Everything that the options ask for, printed as it comes."""
    report = {"machine": machine(options.device), "quick": options.quick, "ceilings": [], "results": []}
    found: dict[int, Ceilings] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        found[threads] = measure_ceilings(options.device, Size(), quick=options.quick)
        report["ceilings"].append({"threads": threads, "ceilings": found[threads].as_dict()})
    print_machine(console, report["machine"], report["ceilings"])
    compiled = not (options.quick or options.no_compile)
    for place, entry in enumerate(entries(options.only)):
        for size in sizes(entry, options):
            for threads in options.threads:
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                case = entry.build(size, options.device)
                if compiled:
                    case = with_compiled(case)
                at = place - next(i for i, e in enumerate(entries(options.only)) if e.op == entry.op)
                for direction in case.floors:
                    result = measure_case(case, direction, threads, found[threads], options, (at, entry))
                    report["results"].append(result)
                    print_result(console, result)
                del case
                gc.collect()
    again(report, found, options, console)
    report["targets"] = verdicts(report["results"])
    print_verdicts(console, report["targets"])
    if options.quick and report["targets"]:
        console.print("The targets are for the default sizes; those of --quick are smaller.")
    return report


def again(report: dict, found: dict[int, Ceilings], options: argparse.Namespace, console: Console) -> None:
    """Measures the ceilings once more: a neighbour at the beginning would have made every floor too easy."""
    for entry in report["ceilings"]:
        threads = entry["threads"]
        torch.set_num_threads(threads)
        found[threads] = found[threads].at_least(measure_ceilings(options.device, Size(), quick=options.quick))
        entry["ceilings"] = found[threads].as_dict()
    raised = []
    for result in report["results"]:
        floor = result["floor"]
        counted = Floor(floor["flops"], floor["bytes"], floor["exps"])
        result["floor"] = found[result["threads"]].floor(counted)
        raised.append(floor["seconds"] / result["floor"]["seconds"])
    if raised and max(raised) > 1.1:
        console.print(
            f"\nThe ceilings were higher at the end of the run: fractions of the floor above are up to "
            f"{max(raised):.2f} times too high. The JSON and its figures have the higher ceilings:"
        )
        print_machine(console, report["machine"], report["ceilings"])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    # A table that is piped into a file is not cut at 80 columns.
    console = Console() if Console().is_terminal else Console(width=160)
    start = time.perf_counter()
    report = run(options, console)
    if options.json:
        from benchmarks.plots import save_plots

        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")
        written = [options.json, *save_plots(report, options.json.with_suffix(""))]
        console.print("\nwritten: " + ", ".join(map(str, written)))
    console.print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
