"""evaluate: evaluates a model by name, for ``vmoe-routers eval``."""

from __future__ import annotations

import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vmoe_routers.files import make_output, write_csv
from vmoe_routers.machine import here_and_now
from vmoe_routers.options import OptionError
from vmoe_routers.training.evaluation import Evaluation, evaluate_model
from vmoe_routers.training.loader import evaluation_batches
from vmoe_routers.training.processes import processes
from vmoe_routers.training.report import class_rows, print_evaluation, write_json
from vmoe_routers.training.subject import channels_of, input_size, load, open_subject
from vmoe_routers.training.throughput import REPEATS, WARM_UP, Throughput, measure_throughput

EVALUATION, PER_CLASS, THROUGHPUT = "evaluation.json", "per_class.csv", "throughput.json"


def evaluate(
    model: str,
    data: str = "digits",
    data_root: Path | None = None,
    image_size: int | None = None,
    normalization: str | None = None,
    crop_pct: float | None = None,
    batch_size: int = 128,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "float32",
    workers: int = 2,
    bad_images: str = "stop",
    output: Path = Path("evaluation"),
    benchmark: bool = False,
    *,
    console: Console | None = None,
) -> Evaluation | Throughput:
    """Evaluates a model on the test images of a data set, prints tables, and writes evaluation.json and per_class.csv.

    On many devices, every process that torchrun started calls this function. Every image counts once.

    Args:
        model: a folder of save_pretrained, a study's record (runs/*-seed*.json), P of a V-MoE checkpoint (P.index),
            "vit_moe", or a model of timm.
        data: "digits", a folder, or another name that `open_data` takes (docs/data.md).
        data_root: folder of data sets of torchvision, also for downloads.
        image_size: height and width of the model's input in pixels, by default the model's own.
        normalization: "inception", "imagenet", "clip" or "none". By default the model's, if it is known.
        crop_pct: central share of an image that the model sees, by default as in the model's training.
        batch_size: images per batch, on all processes together.
        pretrained: load timm's weights of the model, which are downloaded.
        model_args: arguments that replace the model's own, such as {capacity_factor: 2}.
        device: "auto", "cpu" or "cuda".
        dtype: dtype of parameters and images: float32, bfloat16 or float16.
        workers: processes that load images.
        bad_images: "stop" ends the evaluation at an unreadable image, "skip" leaves it out and counts it.
        output: the folder for the files.
        benchmark: time forwards of random images instead, and write throughput.json.
        console: console that shows the tables.

    Raises:
        ValueError: Options, model or data do not fit together. The message is for the user.
        OSError: A file cannot be written.
    """
    console = console or Console(markup=False, emoji=False, highlight=False)
    if batch_size < 1:
        raise OptionError(f"batch_size must be at least 1, got {batch_size}", "batch_size")
    with processes(device) as world:
        console = console if world.first else Console(quiet=True)
        if benchmark:
            if world.first:
                make_output(output)
            loaded = load(model, image_size, pretrained, model_args, world.device, dtype)
            size = image_size or input_size(loaded, model)
            throughput = measure_throughput(loaded, (channels_of(loaded, model), size, size), batch_size)
            console.print(_describe(throughput, model), soft_wrap=True)
            if world.first:
                write_json(output / THROUGHPUT, {"model": model, **asdict(throughput), **here_and_now()})
            return throughput
        subject = open_subject(
            model,
            data,
            data_root=data_root,
            image_size=image_size,
            normalization=normalization,
            crop_pct=crop_pct,
            pretrained=pretrained,
            model_args=model_args,
            device=world.device,
            dtype=dtype,
        )
        samples, classes = subject.data.test, subject.data.classes
        outputs = getattr(subject.model, "num_classes", len(classes))
        if outputs != len(classes):
            raise OptionError(
                f"model {model!r} has {outputs} classes, data {data!r} has {len(classes)}; wanted data with the "
                "classes of the model's training",
                "model",
                "data",
            )
        if world.first:
            make_output(output)
        batches = evaluation_batches(
            samples,
            subject.transform,
            batch_size=batch_size,
            rank=world.rank,
            world=world.size,
            workers=workers,
            bad_images=bad_images,
            device=world.device,
        )
        with batches:
            found = evaluate_model(subject.model, batches, len(classes))
        unreadable = len(samples) - found.images
        left_out = f"; unreadable images left out: {unreadable:,}" if unreadable else ""
        console.print(f"{model} on {found.images:,} test images of {subject.data.name}{left_out}", soft_wrap=True)
        console.print(f"input: {subject}", soft_wrap=True)
        print_evaluation(found, classes, console)
        if world.first:
            rows = class_rows(found, classes)
            record = {"model": model, "data": data, "input": subject.input(), "batch_size": batch_size, "dtype": dtype}
            record |= {**asdict(found), "unreadable": unreadable, "classes": rows, **here_and_now()}
            write_json(output / EVALUATION, record)
            write_csv(output / PER_CLASS, rows)
            console.print(f"written: {output / EVALUATION}, {output / PER_CLASS}", soft_wrap=True)
        return found


def _describe(found: Throughput, model: str) -> str:
    shape = " x ".join(map(str, found.image_shape))
    times = found.milliseconds
    return (
        f"{model}: {found.images_per_second:,.1f} images/s\n"
        f"batches of {found.batch_size} images, {shape}, {found.dtype}, on {found.device}\n"
        f"median of {REPEATS} forwards after {WARM_UP}: {statistics.median(times):.1f} ms "
        f"({times[0]:.1f} to {times[-1]:.1f} ms)"
    )
