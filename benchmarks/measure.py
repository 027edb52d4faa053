"""Measures one case in every direction: correctness, times, floors, memory."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace

import torch

from benchmarks.case import BACKWARD, Case, Variant
from benchmarks.ceilings import Ceilings
from benchmarks.compare import applies, check, recording, runner
from benchmarks.memory import peaks, saved_bytes
from benchmarks.plan import Job
from benchmarks.timer import Queued, is_unstable, measure, paired


def with_compiled(case: Case) -> Case:
    """Adds torch.compile of the first index form to the case."""
    torch.compiler.reset()
    form = next((v for v in case.variants if v.role == "index"), None)
    if form is None:
        return case
    compiled = replace(form, name=f"torch.compile of {form.name}", role="compiled", call=torch.compile(form.call))
    return replace(case, variants=(*case.variants, compiled))


def without_naive(case: Case) -> Case:
    """Removes the naive forms from the case, and lists them as skipped."""
    naive = [v.name for v in case.variants if v.role == "naive"]
    lines = [f"{name}: measured only with the first number of threads, at the first size" for name in naive]
    kept = tuple(v for v in case.variants if v.role != "naive")
    return replace(case, variants=kept, skipped=(*case.skipped, *lines))


def usable(case: Case, direction: str, skipped: list[str], device: str) -> list[Variant]:
    """Returns the variants that run and compute correct results. Adds all other variants to `skipped`.

    On a CPU every variant that is not compiled must run. On a GPU only our variant must run, because other variants may
    lack a kernel or memory.

    Raises:
        AssertionError: The results of a variant that is not compiled differ from ours.
    """
    kept = []
    for variant in case.variants:
        if not applies(variant, direction):
            continue
        try:
            check(case, variant, direction)
            with recording(direction):
                runner(variant, direction)()
        except Exception as error:
            needed = device == "cpu" or variant.role == "ours" or isinstance(error, AssertionError)
            if needed and variant.role != "compiled":
                raise
            skipped.append(f"{variant.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        kept.append(variant)
    return kept


def measure_job(job: Job, options: argparse.Namespace, ceilings: Ceilings) -> list[dict]:
    """Measures a job; returns one result per direction."""
    torch.manual_seed(0)
    case = job.entry.build(job.size, options.device)
    if not job.whole:
        case = without_naive(case)
    elif options.compile_until is not None:
        if time.perf_counter() < options.compile_until:
            case = with_compiled(case)
        else:
            case = replace(case, skipped=(*case.skipped, "torch.compile: no time left in a quick run"))
    peak = {}
    if job.whole and options.memory and options.device == "cpu" and case.op != "overhead":
        peak = peaks(case.op, job.index, job.size, job.threads)
    return [measure_case(case, direction, job, options, ceilings, peak) for direction in case.floors]


def measure_case(
    case: Case, direction: str, job: Job, options: argparse.Namespace, ceilings: Ceilings, peak: dict[str, int]
) -> dict:
    """Measures times, ratios, floor and memory.

    On a GPU, times are measured twice: by the clock of the GPU, and per call from Python.
    """
    skipped = list(case.skipped)
    variants = usable(case, direction, skipped, options.device)
    calls = {variant.name: runner(variant, direction) for variant in variants}
    with recording(direction):
        timings, again = measure(calls, rounds=options.rounds, device=options.device)
        called, queued = timings, {}
        if options.device == "cuda" and case.op != "overhead":
            queued = {name: Queued(call) for name, call in calls.items()}
            timings, again = paired(queued, rounds=options.rounds)
    return {
        "op": case.op,
        "title": case.title,
        "size": str(case.size),
        "default": job.default,
        "direction": direction,
        "threads": job.threads,
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
                "called_seconds": called[v.name].seconds if queued else None,
                "waits": bool(queued) and queued[v.name].waits,
                "ratio": asdict(timings[v.name].ratio),
                "saved_bytes": saved_bytes(v) if direction == BACKWARD and v.role != "compiled" else None,
                "peak_bytes": peak.get(f"{v.name}, {direction}"),
            }
            for v in variants
        ],
    }
