"""Runs a study: what is missing, then table, figures and report."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers.config import set_fused_attn

from vmoe_routers.study.columns import print_table, write_csv
from vmoe_routers.study.runs import fingerprint, read_record, record_path, run, write_record
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.summary import summarise
from vmoe_routers.study.timing import ROUNDS, WARM_UP, time_steps
from vmoe_routers.study.variants import Variant, build, variants
from vmoe_routers.training import Images, load
from vmoe_routers.training.data import fit
from vmoe_routers.training.fewshot import SHOTS


class Job(NamedTuple):
    """A run to be done, and where its record goes."""

    variant: Variant
    seed: int
    path: Path


class Timing(NamedTuple):
    """The steps to be timed, of these variants, and where the record goes."""

    variants: list[Variant]
    path: Path

    def is_done(self) -> bool:
        """Whether there is a record of all of them."""
        record = read_record(self.path)
        return record is not None and {variant.name for variant in self.variants} <= set(record["step_ms"])


def run_study(settings: Settings, console: Console | None = None) -> Path:
    """Runs what has no record yet, then writes table, figures and report.

    Records lie in ``settings.output / "runs"``, one a run: interrupted, a study goes on
    where it stopped.

    Returns:
        The report's path.

    Raises:
        ValueError: settings or data that do not fit; in words for the user.
        OSError: an output folder that cannot be written, or a worker process that was killed.
        KeyboardInterrupt: interrupted; what is finished is kept.
    """
    console = console or Console(markup=False, emoji=False)  # names and paths may have brackets
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {settings.device!r}: torch finds no CUDA here")
    data, transfer = _load(settings)
    found = variants(settings)
    for variant in found:
        build(variant, settings, data, seed=0)  # says now what does not fit, not in a worker
    if len(data.train_labels) < settings.batch_size:
        raise ValueError(f"{len(data.train_labels)} training images are less than one batch of {settings.batch_size}")
    if transfer is not None and len(transfer.train_labels) <= SHOTS * transfer.num_classes:
        raise ValueError(
            f"{transfer.name}: {SHOTS}-shot transfer wants more than {SHOTS * transfer.num_classes} training images "
            f"for {transfer.num_classes} classes, there are {len(transfer.train_labels)}"
        )
    settings.output.mkdir(parents=True, exist_ok=True)  # says now if it cannot
    inputs = fingerprint(data, transfer)
    # Seed by seed: an interrupted study has whole comparisons.
    jobs = [
        Job(variant, seed, record_path(settings, inputs, f"{variant.name}-seed{seed}", asdict(variant)))
        for seed in range(settings.seeds)
        for variant in found
    ]
    missing = [job for job in jobs if read_record(job.path) is None]
    timing = Timing(found, record_path(settings, inputs, "steps"))
    console.print(
        f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test images of "
        f"{data.size} x {data.size}, {data.num_classes} classes\n"
        f"models: {len(found)}, seeds: {settings.seeds}, runs: {len(jobs)}, done before: {len(jobs) - len(missing)}"
    )
    if missing or not timing.is_done():
        _run_all(settings, missing, timing, console)
    records = [record for job in jobs if (record := read_record(job.path))]
    timed = read_record(timing.path) or {}
    for record in records:
        record["timing"] = timed | {"step_ms": timed["step_ms"][record["variant"]["name"]]}
    return _write(settings, data, records, console)


def _load(settings: Settings) -> tuple[Images, Images | None]:
    data = load(settings.data, image_size=settings.image_size, max_images=settings.max_images)
    if settings.transfer_data is None:
        return data, None
    transfer = load(settings.transfer_data, max_images=settings.max_images)
    return data, fit(transfer, data.size, data.channels)


def _run_all(settings: Settings, jobs: list[Job], timing: Timing, console: Console) -> None:
    """Runs the jobs side by side, a thread each: models this small gain nothing from more. Then times the steps."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = settings.workers or (cores if settings.device == "cpu" else 1)
    context = multiprocessing.get_context("spawn")
    finished = context.SimpleQueue()
    executor = ProcessPoolExecutor(
        max(1, min(workers, len(jobs))), context, initializer=_start_worker, initargs=(settings, finished)
    )
    try:
        with _progress(console) as progress:
            task = progress.add_task("training", total=len(jobs) * settings.epochs, unit="epochs")
            with _deaf_to_ctrl_c():
                futures = [executor.submit(_work, job) for job in jobs]
                if not jobs:
                    executor.submit(int)  # starts a worker, deaf as well
            _watch(futures, finished, lambda: progress.advance(task), progress.console)
            if not timing.is_done():
                # Alone, now that all the others are done.
                task = progress.add_task("timing", total=WARM_UP + ROUNDS, unit="rounds")
                _watch([executor.submit(_time, timing)], finished, lambda: progress.advance(task), progress.console)
    except KeyboardInterrupt:
        console.print("interrupted; what is finished is kept, and the same command goes on from there")
        raise
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed, perhaps for want of memory (fewer --workers need less); "
            "what is finished is kept, and the same command goes on from there"
        ) from None
    finally:
        for process in list((executor._processes or {}).values()):
            process.terminate()
        executor.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from their first moment on: it is the parent that decides."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    )


def _watch(futures: list[Future], finished: SimpleQueue, advance: Callable[[], None], console: Console) -> None:
    """Shows epochs as they end and runs as they finish, until all have."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        while not finished.empty():
            finished.get()
            advance()
        for record in filter(None, [future.result() for future in done]):
            last = record["epochs"][-1]
            # In 80 columns.
            console.print(
                f"{record['variant']['label']:<40} seed {record['seed']}  acc. {last['accuracy']:.3f}  "
                f"loss {last['loss']:.3f}  {last['seconds']:4.1f} s",
                highlight=False,
            )


def _start_worker(settings: Settings, finished: SimpleQueue) -> None:
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    if settings.device == "cpu":
        set_fused_attn(False)  # a few tokens a head: plain products are faster there
    _worker_state().update(settings=settings, finished=finished, data=_load(settings))


def _leave_with_parent() -> None:
    """Ends this worker when its parent is gone, however that came; else it would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _worker_state() -> dict[str, Any]:
    """What a worker process keeps between its runs."""
    return {}


def _work(job: Job) -> dict[str, Any]:
    state = _worker_state()
    settings, (data, transfer) = state["settings"], state["data"]
    record = run(settings, job.variant, job.seed, data, transfer, lambda: state["finished"].put(None))
    write_record(job.path, record)
    return record


def _time(timing: Timing) -> None:
    state = _worker_state()
    data, _ = state["data"]
    write_record(timing.path, time_steps(state["settings"], timing.variants, data, lambda: state["finished"].put(None)))


def _write(settings: Settings, data: Images, records: list[dict[str, Any]], console: Console) -> Path:
    """Table, figures and report of the records."""
    from vmoe_routers.study import report  # with matplotlib, which a worker need not wait for

    rows = summarise(records)
    print_table(rows, console)
    write_csv(rows, settings.output / "table.csv")
    described = json.loads(json.dumps({**asdict(settings), "data": data.name}, default=str))
    path = report.write_report(settings.output, records, described)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return path
