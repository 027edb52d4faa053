"""Runs a study: all runs without a record, then table, figures and report."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, replace
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from timm.layers.config import set_fused_attn

from vmoe_routers.files import make_output
from vmoe_routers.models.cost import cost
from vmoe_routers.options import OptionError
from vmoe_routers.study.columns import print_table, write_csv
from vmoe_routers.study.memory import check_memory
from vmoe_routers.study.own import is_own, source_digest
from vmoe_routers.study.records import (
    RecordError,
    fingerprint,
    read_record,
    record_path,
    run_record,
    timing_record,
    write_record,
)
from vmoe_routers.study.runs import run
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.summary import summarise
from vmoe_routers.study.timing import ROUNDS, WARM_UP, time_steps
from vmoe_routers.study.variants import Variant, make, variants
from vmoe_routers.study.workers import Workers
from vmoe_routers.training import DataError, Images, load
from vmoe_routers.training.data import DEFAULT_SIZE, fit
from vmoe_routers.training.fewshot import SHOTS


class Job(NamedTuple):
    """Run of a variant with a seed, and the path of its record."""

    variant: Variant
    seed: int
    path: Path

    def read(self, settings: Settings, transfer: Images | None) -> dict[str, Any] | None:
        """Reads the record; returns None if there is none.

        Raises:
            RecordError: The record is damaged.
        """
        return read_record(self.path, run_record(settings, self.variant, self.seed, transfer and transfer.name))


class Timing(NamedTuple):
    """Timing of the variants' steps, and the path of its record."""

    variants: list[Variant]
    path: Path

    def read(self) -> dict[str, Any] | None:
        """Reads the record; returns None if there is none or it lacks a variant.

        Raises:
            RecordError: The record is damaged.
        """
        record = read_record(self.path, timing_record(ROUNDS))
        return record if record and {variant.name for variant in self.variants} <= set(record["step_ms"]) else None


def run_study(settings: Settings, console: Console | None = None) -> Path:
    """Runs every run that has no record yet, then writes table, figures and report.

    Every finished run keeps a record in ``settings.output / "runs"``, so an interrupted study continues where it
    stopped.

    Returns:
        The report's path.

    Raises:
        ValueError: The settings or data cannot be used. The message is for the user.
        OSError: The output folder cannot be written, or a worker process was killed.
        KeyboardInterrupt: The study was interrupted. Finished runs keep their records.
    """
    console = console or Console(markup=False, emoji=False)  # names and paths may contain brackets
    _check_device(settings.device)
    found = variants(settings)
    if settings.image_size is not None:  # before images are resized to this size
        check_memory(settings, found, settings.image_size)
    data, transfer = _load(settings)
    _check_fit(settings, data, transfer)
    images = data.train_images.nbytes + data.test_images.nbytes
    workers = check_memory(settings, found, data.size, data.channels, data.num_classes, images)
    for variant in found:
        _check_model(variant, settings, data)
    make_output(settings.output)  # before the runs, so that a failure comes early
    inputs = fingerprint(data, transfer)
    # Seed by seed, so that an interrupted study has runs of every variant to compare.
    sources = {variant: [source_digest(variant.router)] for variant in found if is_own(variant.router)}
    of = {variant: [asdict(variant), *sources.get(variant, [])] for variant in found}
    jobs = [
        Job(variant, seed, record_path(settings, inputs, f"{variant.name}-seed{seed}", *of[variant]))
        for seed in range(settings.seeds)
        for variant in found
    ]
    timing = Timing(found, record_path(settings, inputs, "steps", *sorted(sources.values())))
    missing = [job for job in jobs if not _is_done(lambda job=job: job.read(settings, transfer), console)]
    is_timed = _is_done(timing.read, console)
    if data.is_default_size:
        console.print(
            f"{data.name}: images differ in size and are resized to {DEFAULT_SIZE} x {DEFAULT_SIZE} pixels; "
            "--image-size sets another size"
        )
    console.print(
        f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test images of "
        f"{data.size} x {data.size}, {data.num_classes} classes\n"
        f"models: {len(found)}, seeds: {settings.seeds}, runs: {len(jobs)}, done before: {len(jobs) - len(missing)}"
    )
    if missing or not is_timed:
        _run_all(settings, missing, None if is_timed else timing, workers, console)
    timed = timing.read()
    records = [record for job in jobs if (record := job.read(settings, transfer)) is not None]
    if timed is None or len(records) < len(jobs):
        raise OSError(f"{settings.output / 'runs'}: a record was removed while the study ran")
    for record in records:
        record["timing"] = timed | {"step_ms": timed["step_ms"][record["variant"]["name"]]}
    return _write(settings, data, records, console)


def _is_done(read: Callable[[], dict[str, Any] | None], console: Console) -> bool:
    """Tells whether an undamaged record exists. Prints the name of a damaged record."""
    try:
        return read() is not None
    except RecordError as error:
        console.print(f"{error}; run again", highlight=False, soft_wrap=True)
        return False


def _check_device(device: str) -> None:
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise OptionError(f"device {device!r}: torch finds no CUDA device", "device")
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {device!r}: there are {torch.cuda.device_count()} CUDA devices", "device")


def _check_fit(settings: Settings, data: Images, transfer: Images | None) -> None:
    """Refuses settings that do not fit the data."""
    if len(data.train_labels) < settings.batch_size:
        raise OptionError(
            f"batch_size {settings.batch_size}: {len(data.train_labels)} training images are less than one batch",
            "batch_size",
        )
    if data.size % settings.patch_size:
        raise OptionError(
            f"patch_size {settings.patch_size} does not divide images of {data.size} x {data.size} pixels", "patch_size"
        )
    if settings.shift >= data.size:
        raise OptionError(
            f"shift {settings.shift} moves images of {data.size} x {data.size} pixels out of the frame", "shift"
        )
    if transfer is not None and len(transfer.train_labels) <= SHOTS * transfer.num_classes:
        raise DataError(
            f"{transfer.name}: {SHOTS}-shot transfer needs more than {SHOTS * transfer.num_classes} training images "
            f"for {transfer.num_classes} classes, there are {len(transfer.train_labels)}"
        )


def _check_model(variant: Variant, settings: Settings, data: Images) -> None:
    """Builds the variant's model with one block of each kind, so that an error appears before the runs start.

    Raises:
        ValueError: Sizes do not fit together.
        OptionError: An own router cannot be built, trained on a group of images or measured.
    """
    shallow = replace(settings, depth=min(settings.depth, 2))
    if not is_own(variant.router):
        with torch.device("meta"):
            make(variant, shallow, data)
        return
    # An own router may need values, which tensors on the meta device lack.
    try:
        model = make(variant, shallow, data).train()
        model(data.train_images[: settings.group_size]).sum().backward()
        cost(model)
    except OptionError:
        raise
    except Exception as error:  # the router's own code may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"routers: {variant.router!r} fails: {reason}", "routers") from error


def _load(settings: Settings) -> tuple[Images, Images | None]:
    data = load(settings.data, image_size=settings.image_size, max_images=settings.max_images)
    if settings.transfer_data is None:
        return data, None
    transfer = load(settings.transfer_data, max_images=settings.max_images)
    return data, fit(transfer, data.size, data.channels)


def _run_all(settings: Settings, jobs: list[Job], timing: Timing | None, workers: int, console: Console) -> None:
    """Runs the jobs in parallel, then times the steps. A job has one thread: small models gain nothing from more."""
    finished = multiprocessing.get_context("spawn").SimpleQueue()
    try:
        with (
            _progress(console) as progress,
            Workers(max(1, min(workers, len(jobs))), _start_worker, settings, finished) as pool,
        ):
            task = progress.add_task("training", total=len(jobs) * settings.epochs, unit="epochs")
            futures = [pool.submit(_work, job) for job in jobs]
            _watch(futures, finished, lambda: progress.advance(task), progress.console)
            if timing is not None:
                # The timing starts when all runs are finished, so that nothing else is running.
                task = progress.add_task("timing", total=WARM_UP + ROUNDS, unit="rounds")
                _watch([pool.submit(_time, timing)], finished, lambda: progress.advance(task), progress.console)
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


def _watch(futures: list[Future], finished: SimpleQueue, advance: Callable[[], None], console: Console) -> None:
    """Shows every finished epoch and run, until all runs are finished."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
        while not finished.empty():
            finished.get()
            advance()
        for record in filter(None, [future.result() for future in done]):
            last = record["epochs"][-1]
            # At most 80 columns.
            console.print(
                f"{record['variant']['label']:<40} seed {record['seed']}  acc. {last['accuracy']:.3f}  "
                f"loss {last['loss']:.3f}  {last['seconds']:4.1f} s",
                highlight=False,
            )


_worker: dict[str, Any] = {}  # state of a worker process between its runs


def _start_worker(settings: Settings, finished: SimpleQueue) -> None:
    torch.set_num_threads(1)
    if settings.device == "cpu":
        set_fused_attn(False)  # plain products are faster for a few tokens per head
    _worker.update(settings=settings, finished=finished, data=_load(settings))


def _work(job: Job) -> dict[str, Any]:
    settings, (data, transfer) = _worker["settings"], _worker["data"]
    record = run(settings, job.variant, job.seed, data, transfer, lambda: _worker["finished"].put(None))
    write_record(job.path, record)
    return record


def _time(timing: Timing) -> None:
    data, _ = _worker["data"]
    write_record(
        timing.path, time_steps(_worker["settings"], timing.variants, data, lambda: _worker["finished"].put(None))
    )


def _write(settings: Settings, data: Images, records: list[dict[str, Any]], console: Console) -> Path:
    """Writes table, figures and report of the records. Returns the report's path."""
    from vmoe_routers.study import report  # imports matplotlib, which workers do not need

    rows = summarise(records)
    print_table(rows, console)
    write_csv(rows, settings.output / "table.csv")
    described = json.loads(json.dumps({**asdict(settings), "data": data.name}, default=str))
    path = report.write_report(settings.output, records, described)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return path
