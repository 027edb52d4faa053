"""Measures our ops and layers against other ways to compute the same results: `python -m benchmarks.run`.

Measures the ceilings of the machine, then every case. Checks the results of all variants of a case, then times them in
one process, in shuffled rounds, as ratios to ours. Prints tables, and writes a CSV file if asked.
`--help` lists the options.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback

import torch
from rich.console import Console

from benchmarks.case import Floor
from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.kept import write_run
from benchmarks.machine import keep_memory, machine
from benchmarks.measure import measure_job
from benchmarks.plan import jobs, parse
from benchmarks.report.console import TimeLeft, print_machine, print_result, print_verdicts
from benchmarks.report.targets import verdicts


def run(options: argparse.Namespace, console: Console) -> dict:
    """Measures all jobs, prints each result, and returns the report. A failed case does not stop later cases."""
    kept = not options.new_memory and keep_memory()
    about = machine(options.device, memory_kept=kept)
    report = {"machine": about, "quick": options.quick, "ceilings": [], "results": [], "failed": []}
    found: dict[int, Ceilings] = {}
    for threads in options.threads:
        torch.set_num_threads(threads)
        found[threads] = measure_ceilings(options.device, quick=options.quick)
        report["ceilings"].append({"threads": threads, "ceilings": found[threads].as_dict()})
    print_machine(console, report["machine"], report["ceilings"])
    plan = list(jobs(options))
    with TimeLeft(console, [job.entry.weight for job in plan]) as left:
        for job in plan:
            torch.set_num_threads(job.threads)
            try:
                for result in measure_job(job, options, found[job.threads]):
                    report["results"].append(result)
                    print_result(console, result)
            except Exception as error:
                traceback.print_exc()
                report["failed"].append({"op": job.entry.op, "size": str(job.size), "error": repr(error)})
            write(report, options)  # keeps the results of an interrupted run
            gc.collect()
            left.done()
    again(report, found, options, console)
    report["targets"] = verdicts(report)
    print_verdicts(console, report["targets"])
    if options.quick and options.device == "cpu" and report["targets"]:
        console.print("The targets are for the default sizes; --quick has smaller sizes.")
    return report


def write(report: dict, options: argparse.Namespace) -> None:
    """Writes the CSV file, if the options name one."""
    if options.csv:
        write_run(report, options.csv)


def again(report: dict, found: dict[int, Ceilings], options: argparse.Namespace, console: Console) -> None:
    """Measures the ceilings again and keeps the higher of both measurements.

    If another process had slowed the first measurement, times would look too close to the floor.
    """
    for entry in report["ceilings"]:
        threads = entry["threads"]
        torch.set_num_threads(threads)
        found[threads] = found[threads].at_least(measure_ceilings(options.device, quick=options.quick))
        entry["ceilings"] = found[threads].as_dict()
    raised = []
    for result in report["results"]:
        floor = result["floor"]
        counted = Floor(floor["flops"], floor["bytes"], floor["exps"], floor["dtype"])
        result["floor"] = found[result["threads"]].floor(counted)
        raised.append(floor["seconds"] / result["floor"]["seconds"])
    if raised and max(raised) > 1.1:
        console.print(
            f"\nThe ceilings were higher at the end of the run: the fractions of the floor printed above are up to "
            f"{max(raised):.2f} times too high. The CSV file has the higher ceilings:"
        )
        print_machine(console, report["machine"], report["ceilings"])


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments, (__doc__ or "").split(":")[0])
    # Without a terminal, rich would cut tables at 80 columns.
    console = Console() if Console().is_terminal else Console(width=160)
    start = time.perf_counter()
    report = run(options, console)
    report["seconds"] = time.perf_counter() - start
    write(report, options)
    if options.csv:
        console.print(f"\nwritten: {options.csv}")
    console.print(f"{report['seconds']:.0f} s")
    if report["failed"]:
        cases = ", ".join(f"{case['op']} [{case['size']}]" for case in report["failed"])
        sys.exit(f"benchmarks.run: failed: {cases}")


if __name__ == "__main__":
    main()
