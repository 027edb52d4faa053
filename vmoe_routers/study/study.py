"""Runs a study: all runs without a record, then table, figures and report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from vmoe_routers.files import make_output
from vmoe_routers.models.cost import cost
from vmoe_routers.options import OptionError
from vmoe_routers.study.claims import CLAIMS, decide, verdicts
from vmoe_routers.study.columns import print_table, write_csv
from vmoe_routers.study.execution import run_all
from vmoe_routers.study.folders import add_timing, read_contents, read_runs, write_contents
from vmoe_routers.study.images import StudyData, first_images, load_images
from vmoe_routers.study.jobs import Job, Timing
from vmoe_routers.study.memory import check_memory
from vmoe_routers.study.own import is_own
from vmoe_routers.study.records import RecordError, fingerprint, run_path, timing_path
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.summary import chance_accuracy, summarise
from vmoe_routers.study.variants import Variant, ablated, make, planned_runs, variants
from vmoe_routers.training import DataError, Images
from vmoe_routers.training.data import DEFAULT_SIZE
from vmoe_routers.training.fewshot import SHOTS
from vmoe_routers.training.loader import smaller_batch
from vmoe_routers.training.optimisation import make_optimizer
from vmoe_routers.training.transforms import Transform


def run_study(settings: Settings, console: Console | None = None) -> Path:
    """Runs every run that has no record yet, then writes table, claims, figures and report.

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
    found, of_ablations = variants(settings), ablated(settings)
    if settings.image_size is not None:  # before images are resized to this size
        check_memory(settings, found, of_ablations, settings.image_size)
    data, transfer = load_images(settings)
    _check_fit(settings, data, transfer)
    workers = check_memory(settings, found, of_ablations, data.size, data.channels, data.num_classes, data.nbytes)
    for variant in [*found, *of_ablations]:
        _check_model(variant, settings, data)
    make_output(settings.output)  # before the runs, so that a failure comes early
    inputs = fingerprint(data, transfer)
    jobs = [Job(variant, seed, run_path(settings, inputs, variant, seed)) for variant, seed in planned_runs(settings)]
    timing = Timing(found, timing_path(settings, inputs, found))
    write_contents(settings, data, jobs, timing)
    missing = [job for job in jobs if not _is_done(lambda job=job: job.read(settings, transfer), console)]
    is_timed = _is_done(timing.read, console)
    others = _others(settings, jobs, timing)
    if others:
        console.print(
            f"{settings.output / 'runs'}: {others} records of other settings, seeds, images or versions, which this "
            "study does not use",
            highlight=False,
            soft_wrap=True,
        )
    if data.is_default_size:
        console.print(
            f"{data.name}: images differ in size and are resized to {DEFAULT_SIZE} x {DEFAULT_SIZE} pixels; "
            "--image-size sets another size"
        )
    routers = {variant.router for variant in found}
    kinds = f"{'a dense ViT, and ' if None in routers else ''}variants of {len(routers - {None})} routers"
    of_ablation = f"variants of ablations: {len(of_ablations)}, " if of_ablations else ""
    console.print(
        f"{data.name}: {len(data.train_labels):,} training and {len(data.test_labels):,} test images of "
        f"{data.size} x {data.size}, {data.num_classes} classes\n"
        f"models: {len(found)} ({kinds}), seeds: {settings.seeds}, {of_ablation}runs: {len(jobs)}, "
        f"done before: {len(jobs) - len(missing)}",
        soft_wrap=True,
    )
    if missing or not is_timed:
        run_all(settings, missing, None if is_timed else timing, workers, console)
    timed = timing.read()
    records = [record for job in jobs if (record := job.read(settings, transfer)) is not None]
    if timed is None or len(records) < len(jobs):
        raise OSError(f"{settings.output / 'runs'}: a record was removed while the study ran")
    for record in records:
        add_timing(record, timed)
    described = json.loads(json.dumps({**asdict(settings), "data": data.name}, default=str))
    return _write(settings.output, described, records, len(jobs), chance_accuracy(data.test_labels), console)


def report_study(folder: Path | str, console: Console | None = None) -> Path:
    """Writes table, claims, figures and report of the finished runs in a folder. Runs nothing and needs no images.

    Returns:
        The report's path.

    Raises:
        RecordError: The folder holds no study, a study of another version, no finished run, or a damaged record.
        OSError: A file cannot be read or written.
    """
    folder = Path(folder)
    contents = read_contents(folder)
    records = read_runs(folder, contents)
    if not records:
        raise RecordError(f"{folder}: holds no finished run")
    described = contents["settings"] | {"data": contents["data"]}
    console = console or Console(markup=False, emoji=False)
    return _write(folder, described, records, len(set(contents["runs"])), contents.get("chance"), console)


def _others(settings: Settings, jobs: Sequence[Job], timing: Timing) -> int:
    """Counts the records in the folder that do not belong to the study."""
    own = {timing.path.name, *(job.path.name for job in jobs)}
    return sum(path.name not in own for path in (settings.output / "runs").glob("*.json"))


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
        raise OptionError(f"device {device!r}: torch finds no CUDA device; cpu runs here", "device")
    if int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise OptionError(f"device {device!r}: there are {torch.cuda.device_count()} CUDA devices", "device")


def _check_fit(settings: Settings, data: StudyData, transfer: Images | None) -> None:
    """Refuses settings that do not fit the data."""
    trained = len(data.train_labels) - settings.holdout
    if trained < settings.batch_size:
        raise OptionError(
            f"batch_size {settings.batch_size}: {max(trained, 0)} training images are less than one batch; wanted for "
            f"example {smaller_batch(trained)}",
            "batch_size",
            *(["holdout"] if settings.holdout else []),
        )
    if data.size % settings.patch_size:
        raise OptionError(
            f"patch_size {settings.patch_size} does not divide images of {data.size} x {data.size} pixels", "patch_size"
        )
    if settings.shift >= data.size:
        raise OptionError(
            f"shift {settings.shift} moves images of {data.size} x {data.size} pixels out of the frame", "shift"
        )
    augmentation = settings.augmentation(data.size)
    if settings.batch_size % augmentation.repeats:
        raise OptionError(
            f"batch_size must be a multiple of repeats {augmentation.repeats} in training, got {settings.batch_size}",
            "batch_size",
            "training",
        )
    if augmentation.mixes and settings.batch_size % 2:
        raise OptionError(
            f"batch_size must be even for mixup and cutmix in training, got {settings.batch_size}",
            "batch_size",
            "training",
        )
    try:
        Transform(augmentation, data.channels, training=True)
        # Every optimizer takes this model, so an error means wrong arguments.
        make_optimizer(nn.Linear(1, 1), replace(settings.optimisation(), layer_decay=1.0))
    except OptionError as error:
        raise OptionError(f"training: {error}", "training") from None
    if transfer is not None and len(transfer.train_labels) <= SHOTS * transfer.num_classes:
        raise DataError(
            f"{transfer.name}: {SHOTS}-shot transfer needs more than {SHOTS * transfer.num_classes} training images "
            f"for {transfer.num_classes} classes, there are {len(transfer.train_labels)}"
        )


def _check_model(variant: Variant, settings: Settings, data: StudyData) -> None:
    """Builds the variant's model with one block of each kind, so that an error appears before the runs start.

    Raises:
        ValueError: Sizes do not fit together.
        OptionError: The warm-up is longer than the run. Or an own router cannot be built, trained on a group of images
            or measured.
    """
    settings = variant.settings(settings)
    steps = (len(data.train_labels) - settings.holdout) // settings.batch_size * settings.epochs
    try:
        settings.optimisation().check_steps(steps)
    except OptionError as error:
        of = f"ablation {variant.ablation}, value {variant.arm}: " if variant.ablation else ""
        raise OptionError(f"training: {of}{error}", "training") from None
    shallow = replace(settings, depth=2, moe_blocks="last_1")
    if not is_own(variant.router):
        with torch.device("meta"):
            make(variant, shallow, data)
        return
    # An own router may need values, which tensors on the meta device lack.
    try:
        model = make(variant, shallow, data).train()
        model(first_images(settings, data, settings.group_size)[0]).sum().backward()
        cost(model)
    except OptionError:
        raise
    except Exception as error:  # the router's own code may raise any error
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"routers: {variant.router!r} fails: {reason}", "routers") from error


def _write(
    folder: Path,
    settings: dict[str, Any],
    records: list[dict[str, Any]],
    planned: int,
    chance: float | None,
    console: Console,
) -> Path:
    """Writes table, figures and report of the records. Returns the report's path."""
    from vmoe_routers.study import report  # imports matplotlib, which workers do not need

    rows = summarise(records)
    if not rows:
        console.print(report.NO_RUN, highlight=False, soft_wrap=True)
    else:
        print_table(rows, console)
        if all(row.seeds == 1 for row in rows):
            console.print(report.ONE_SEED, highlight=False, soft_wrap=True)
        else:
            _print_verdicts(records, console)
    for sentence in report.of_equal_aux_losses(records, planned):
        console.print(f"\n{sentence}", highlight=False)
    write_csv(rows, folder / "table.csv")
    for sentence in report.unlearned(rows, chance):
        console.print(sentence, highlight=False, soft_wrap=True)
    path = report.write_report(folder, records, settings, planned, chance)
    console.print(f"report: {path}", highlight=False, soft_wrap=True)
    return path


def _print_verdicts(records: Sequence[dict[str, Any]], console: Console) -> None:
    found = verdicts(decide(records))
    if any(words != "not tested" for words in found.values()):
        console.print()
    for claim, words in found.items():
        if words != "not tested":
            console.print(f"({claim}) {CLAIMS[claim]}\n    {words}", highlight=False)
