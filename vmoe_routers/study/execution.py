"""Runs the jobs of a study in worker processes."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.queues import SimpleQueue
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers.config import set_fused_attn

from vmoe_routers.study.images import load_images
from vmoe_routers.study.jobs import Job, Timing
from vmoe_routers.study.locks import locked
from vmoe_routers.study.records import RecordError, write_record
from vmoe_routers.study.runs import run
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.timing import ROUNDS, WARM_UP, time_steps
from vmoe_routers.study.workers import Workers

POLL = 5.0
"""Seconds between two checks whether another process has finished its runs."""


def run_all(settings: Settings, jobs: list[Job], timing: Timing | None, workers: int, console: Console) -> None:
    """Runs the jobs in parallel, then times the steps. A job has one thread: small models gain nothing from more.

    Other processes may share the folder. A job that another process is running is left to that process. If that process
    ends without a record, the job runs here.
    """
    finished = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        with (
            _progress(console) as progress,
            Workers(max(1, min(workers, len(jobs))), _start_worker, settings, finished) as pool,
        ):
            total = sum(job.variant.settings(settings).epochs for job in jobs)
            task = progress.add_task("training", total=total, unit="epochs")
            _finish(pool.submit, _work, jobs, finished, lambda: progress.advance(task), progress.console)
            progress.update(task, completed=total)
            if timing is not None:
                # The timing starts when all runs are finished, so that nothing else is running.
                task = progress.add_task("timing", total=WARM_UP + ROUNDS, unit="rounds")
                _finish(pool.submit, _time, [timing], finished, lambda: progress.advance(task), progress.console)
                progress.update(task, completed=WARM_UP + ROUNDS)
    except KeyboardInterrupt:
        console.print("interrupted; finished runs are kept, and the same command continues from there")
        raise
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed, perhaps because memory ran out (fewer --workers need less); "
            "finished runs are kept, and the same command continues from there"
        ) from None


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


def _finish(
    submit: Callable[..., Future],
    work: Callable[[Any], tuple[bool, dict[str, Any] | None]],
    jobs: Sequence[Any],
    finished: SimpleQueue,
    advance: Callable[[], None],
    console: Console,
) -> None:
    """Submits the jobs until all are done. A job that another process was running is submitted again."""
    waiting, was_told = list(jobs), False
    while waiting:
        futures = {submit(work, job): job for job in waiting}
        waiting = _watch(futures, finished, advance, console)
        if waiting:
            if not was_told:
                console.print(f"waiting for another process, which is running {len(waiting)} of the runs")
                was_told = True
            time.sleep(POLL)


def _watch(
    futures: dict[Future, Any], finished: SimpleQueue, advance: Callable[[], None], console: Console
) -> list[Any]:
    """Shows every finished epoch and run, until all jobs are over. Returns the jobs that another process is running."""
    pending, elsewhere = set(futures), []
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        while not finished.empty():
            finished.get()
            advance()
        for future in done:
            is_done, record = future.result()
            if not is_done:
                elsewhere.append(futures[future])
            if record is not None:
                _show(record, console)
    return elsewhere


def _show(record: dict[str, Any], console: Console) -> None:
    final = record["final"]
    # At most 80 columns.
    console.print(
        f"{record['variant']['label'][:46]:<46} seed {record['seed']}  acc. {final['accuracy']:.3f}  "
        f"loss {final['loss']:.3f}",
        highlight=False,
    )
    if record["diverged"]:
        console.print(f"  diverged: {record['diverged']}", highlight=False, soft_wrap=True)


_worker: dict[str, Any] = {}  # state of a worker process between its runs


def _start_worker(settings: Settings, finished: SimpleQueue) -> None:
    torch.set_num_threads(1)
    if settings.device == "cpu":
        set_fused_attn(False)  # plain products are faster for a few tokens per head
    _worker.update(settings=settings, finished=finished, data=load_images(settings))


def _work(job: Job) -> tuple[bool, dict[str, Any] | None]:
    """Runs a job. Returns whether its record exists, and the record if this process made it."""
    settings, (data, transfer) = _worker["settings"], _worker["data"]
    with locked(job.path) as is_free:
        if not is_free:
            return False, None
        with suppress(RecordError):  # another process may have finished the run
            if job.read(settings, transfer) is not None:
                return True, None
        folder = job.model_folder(settings)
        record = run(settings, job.variant, job.seed, data, transfer, lambda: _worker["finished"].put(None), folder)
        write_record(job.path, record)
    return True, record


def _time(timing: Timing) -> tuple[bool, None]:
    data, _ = _worker["data"]
    with locked(timing.path) as is_free:
        if not is_free:
            return False, None
        with suppress(RecordError):
            if timing.read() is not None:
                return True, None
        settings = _worker["settings"]
        write_record(timing.path, time_steps(settings, timing.variants, data, lambda: _worker["finished"].put(None)))
    return True, None
