"""train: trains a model from settings, for ``vmoe-routers train``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import timm
import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor, nn

from vmoe_routers.checkpoints import CheckpointError, save_pretrained
from vmoe_routers.checkpoints.pretrained import CONFIG, WEIGHTS
from vmoe_routers.distributed import whole_state_dict
from vmoe_routers.files import make_output, write_whole
from vmoe_routers.options import OptionError
from vmoe_routers.training import checkpoint
from vmoe_routers.training.curve import draw_curve
from vmoe_routers.training.describe import describe, draw_batch, memory_estimate
from vmoe_routers.training.evaluation import Evaluation, evaluate_model
from vmoe_routers.training.interrupts import asking
from vmoe_routers.training.layout import check_groups, lay_out, make_model
from vmoe_routers.training.loader import Batches, evaluation_batches, smaller_batch, training_batches
from vmoe_routers.training.log import EVALUATIONS, Outputs, read_table
from vmoe_routers.training.meter import Meter
from vmoe_routers.training.optimisation import make_optimizer
from vmoe_routers.training.processes import Vote, World, processes
from vmoe_routers.training.samples import Data
from vmoe_routers.training.settings import MAY_CHANGE, SETTINGS, TrainSettings, read_settings
from vmoe_routers.training.sources import open_data
from vmoe_routers.training.trainer import Trainer
from vmoe_routers.training.transforms import PREPROCESSING, Mixing, Transform

CHECKPOINTS, MODEL = "checkpoints", "model"
_LOCK_TIMEOUT = 15.0  # seconds; the workers of a killed process keep its lock until they notice its end, after about 5


def train(
    settings: TrainSettings | None = None,
    /,
    *,
    dry_run: bool = False,
    console: Console | None = None,
    **options: Any,
) -> Path:
    """Trains a model, or continues its training from the newest checkpoint in the output folder.

    ``train(data="photos", router="soft")`` is ``train(TrainSettings(data="photos", router="soft"))``. On many devices,
    every process that torchrun started calls this function.

    Args:
        settings: The settings, by default made from `options`.
        dry_run: Only describes model, cost, data and memory, and draws the first batch.
        console: Console that shows progress.
        options: Fields of `TrainSettings`.

    Returns:
        The folder of the trained model, for `from_pretrained`; with `dry_run` the picture of the first batch.

    Raises:
        ValueError: Settings, data or checkpoints do not fit together. The message is for the user.
        OSError: A file cannot be written.
        TrainingError: Loss or gradient was not finite for many steps.
        KeyboardInterrupt: The training was interrupted. After the first interrupt it was saved.
    """
    if settings is None:
        settings = TrainSettings(**options)
    elif options:
        raise TypeError(f"train: give settings or options, not both: {sorted(options)}")
    console = console or Console(markup=False, emoji=False, highlight=False)
    with processes(settings.device) as world:
        run = _dry_run if dry_run else _train
        return run(settings, world, console if world.first else Console(quiet=True))


class Plan(NamedTuple):
    """Numbers of steps of a training.

    Attributes:
        image_size: height and width of the model's images.
        steps_per_epoch, steps: steps of an epoch, and of the whole training.
        evaluate_every, save_every: steps between evaluations, and between checkpoints.
    """

    image_size: int
    steps_per_epoch: int
    steps: int
    evaluate_every: int
    save_every: int

    @classmethod
    def make(cls, settings: TrainSettings, data: Data, world: World) -> Plan:
        """Plans the steps.

        Raises:
            OptionError: The batch size does not fit the data or the processes, or another option the size or number of
                the images.
        """
        parts = world.size * settings.accumulate
        if settings.batch_size % parts:
            raise OptionError(
                f"batch_size {settings.batch_size} must be a multiple of {parts}, the number of processes "
                f"({world.size}) times accumulate ({settings.accumulate})",
                "batch_size",
                "accumulate",
            )
        if settings.mixes and settings.batch_size // world.size % 2:
            raise OptionError(
                f"batch_size {settings.batch_size} must be a multiple of {2 * world.size}, because mixup and cutmix "
                "mix pairs of images",
                "batch_size",
                "mixup",
                "cutmix",
            )
        steps_per_epoch = len(data.train) // settings.batch_size
        if not steps_per_epoch:
            raise OptionError(
                f"batch_size {settings.batch_size}: {len(data.train)} training images are less than one batch; wanted "
                f"for example {smaller_batch(len(data.train))}",
                "batch_size",
            )
        steps = steps_per_epoch * settings.epochs
        settings.check_steps(steps)
        image_size = settings.image_size or data.size or 224
        settings.augmentation(image_size)  # checks the shift
        evaluate_every = settings.evaluate_every or steps_per_epoch
        return cls(
            image_size,
            steps_per_epoch,
            steps,
            evaluate_every,
            settings.save_every or evaluate_every,
        )


def _train(settings: TrainSettings, world: World, console: Console) -> Path:
    data = open_data(settings.data, data_root=settings.data_root)
    plan = Plan.make(settings, data, world)
    model = make_model(settings, data, plan.image_size)
    check_groups(model, settings, world)
    with _claimed(settings, world):
        return _run(settings, world, console, data, plan, model)


def _run(settings: TrainSettings, world: World, console: Console, data: Data, plan: Plan, model: nn.Module) -> Path:
    trainer = Trainer(
        lay_out(model, settings, world),
        settings,
        plan.steps,
        seed=settings.seed,
        rank=world.rank,
        autocast=settings.parallel == "ddp" or world.size == 1,
    )
    best = _restore(settings.output, trainer, console)
    console.print(describe(settings, data, plan, model, world), soft_wrap=True)
    augmentation = settings.augmentation(plan.image_size)
    mix = None
    if augmentation.mixes:
        mix = Mixing(augmentation, data.num_classes, seed=settings.seed, rank=world.rank)
    batches = _training_batches(settings, data, plan, trainer.step, world)
    outputs = Outputs(settings.output, console, trainer.step, plan.steps, world.first)
    meter = Meter(trainer, batches, world)
    vote = Vote(world)

    with outputs, batches, asking() as interrupt:
        for batch in batches:
            step = trainer.step + 1
            is_last, is_best = step == plan.steps, False
            is_logged = is_last or step % settings.log_every == 0
            images, targets = batch.images, batch.labels
            if mix is not None:
                images, targets = mix(images, targets, trainer.step)
            with meter.recording(is_logged and not settings.compile, batch.valid):
                report = trainer(images, targets)
            meter.add(report, len(images))
            outputs.advance()
            if is_logged:
                outputs.log(meter.row(plan.steps_per_epoch), meter.layers)
                trainer.check(images)
            if is_last or step % plan.evaluate_every == 0:
                found = _evaluate(settings, data, plan, trainer, world)
                outputs.evaluated(step, step / plan.steps_per_epoch, found)
                is_best = best is None or found.top1 > best["top1"]
                if is_best:
                    best = {"step": step, "top1": found.top1}
                meter.restart()
            is_stopped = vote(interrupt.asked)
            is_kept = is_best and "best" in settings.keep
            if is_last or is_stopped or is_kept or step % plan.save_every == 0:
                checkpoint.save(settings.output / CHECKPOINTS, trainer, {"best": best})
                checkpoint.tidy(settings.output / CHECKPOINTS, settings.keep, best["step"] if best else None)
                meter.restart()
            if is_stopped and not is_last:
                console.print(
                    f"interrupted; saved at step {step}, and the same command continues from there", soft_wrap=True
                )
                raise KeyboardInterrupt
        if world.any(outputs.lack_evaluation):  # a finished training, whose evaluations are missing
            outputs.evaluated(trainer.step, settings.epochs, _evaluate(settings, data, plan, trainer, world))
    for error in batches.bad_images:
        console.print(f"skipped: {error}", soft_wrap=True)
    return _export(settings, plan, trainer, world, console)


def _dry_run(settings: TrainSettings, world: World, console: Console) -> Path:
    """Describes the training and draws its first batch. Returns the picture's path."""
    data = open_data(settings.data, data_root=settings.data_root)
    plan = Plan.make(settings, data, world)
    model = make_model(settings, data, plan.image_size)
    check_groups(model, settings, world)
    make_optimizer(model, settings)
    console.print(describe(settings, data, plan, model, world), soft_wrap=True)
    console.print(memory_estimate(model, settings, data, plan.image_size, world), soft_wrap=True)
    make_output(settings.output)
    path = settings.output / "first_batch.png"
    with _training_batches(settings, data, plan, 0, world) as batches:
        images = next(batches).images
    if world.first:
        draw_batch(images, settings.augmentation(plan.image_size), path)
    console.print(f"first batch: {path}", soft_wrap=True)
    return path


@contextmanager
def _claimed(settings: TrainSettings, world: World) -> Iterator[None]:
    """Locks the output folder and writes the settings to it. A training in the folder must have the same settings.

    Raises:
        OptionError: The folder has a training with other settings, cannot be written, or another process trains in it.
    """
    lock = FileLock(settings.output / ".lock", timeout=_LOCK_TIMEOUT)
    if world.first:
        make_output(settings.output)
        try:
            lock.acquire()
        except Timeout:
            raise OptionError(
                f"output {str(settings.output)!r}: another process trains in this folder", "output"
            ) from None
    try:
        _check_and_write(settings, world)
        yield
    finally:
        lock.release()


def _check_and_write(settings: TrainSettings, world: World) -> None:
    path, wanted = settings.output / SETTINGS, settings.to_dict()
    if checkpoint.saved(settings.output / CHECKPOINTS):
        found = read_settings(path)
        differing = [
            name for name in wanted if name not in MAY_CHANGE and found.get(name, wanted[name]) != wanted[name]
        ]
        if differing:
            name = differing[0]
            raise OptionError(
                f"output {str(settings.output)!r} has a training with {name} {found[name]!r}, now {wanted[name]!r}; "
                "choose another output, or delete that folder",
                name,
                "output",
            )
    if world.first:
        write_whole(path, lambda partial: partial.write_text(yaml.safe_dump(wanted, sort_keys=False)))


def _restore(output: Path, trainer: Trainer, console: Console) -> dict[str, Any] | None:
    """Continues from the newest checkpoint, if there is one. Returns the best evaluation before this checkpoint."""
    info = checkpoint.restore(output / CHECKPOINTS, trainer, lambda line: console.print(line, soft_wrap=True))
    if info is None:
        return None
    console.print(f"{output}: continues from step {trainer.step} of {trainer.steps}", soft_wrap=True)
    return info["best"]


def _training_batches(settings: TrainSettings, data: Data, plan: Plan, first_step: int, world: World) -> Batches:
    augmentation = settings.augmentation(plan.image_size)
    return training_batches(
        data.train,
        Transform(augmentation, data.channels, training=True),
        batch_size=settings.batch_size,
        steps=plan.steps,
        seed=settings.seed,
        first_step=first_step,
        rank=world.rank,
        world=world.size,
        workers=settings.workers,
        bad_images=settings.bad_images,
        device=world.device,
    )


def _evaluate(settings: TrainSettings, data: Data, plan: Plan, trainer: Trainer, world: World) -> Evaluation:
    """Evaluates the model on the test images, with the average of the parameters if there is one."""
    batches = evaluation_batches(
        data.test,
        Transform(settings.augmentation(plan.image_size), data.channels, training=False),
        batch_size=max(settings.batch_size // settings.accumulate, world.size),
        rank=world.rank,
        world=world.size,
        workers=settings.workers,
        bad_images=settings.bad_images,
        device=world.device,
    )
    with trainer.averaged(), trainer.autocasting(), batches:
        return evaluate_model(trainer.plain, batches, data.num_classes)


def _export(settings: TrainSettings, plan: Plan, trainer: Trainer, world: World, console: Console) -> Path:
    """Writes the model and the curve, and prints the next command. Returns the model's folder.

    The parameters alone are written for a model that save_pretrained cannot describe: a model with a router of the
    user's own, or without MoE layers.
    """
    folder = settings.output / MODEL
    with trainer.averaged():
        state = whole_state_dict(trainer.plain)
    if world.first:
        problem = _save_model(settings, trainer.plain, folder, state)
        curve = draw_curve(settings.output)
        last = read_table(settings.output / EVALUATIONS)[-1]
        console.print(
            f"accuracy {float(last['top1']):.4f}, loss {float(last['loss']):.4f} after {plan.steps} steps\n"
            f"model: {folder}\ncurve: {curve}",
            soft_wrap=True,
        )
        follow_up = f"next: vmoe-routers eval --model {folder} --data {settings.data}"
        console.print(f"{WEIGHTS} has the parameters alone: {problem}" if problem else follow_up, soft_wrap=True)
    world.barrier()
    return folder


def _save_model(settings: TrainSettings, model: nn.Module, folder: Path, state: dict[str, Tensor]) -> str:
    """Writes the model, or its parameters alone if from_pretrained cannot make the model.

    Returns the reason why only the parameters were written, or "".
    """
    is_upcycled, values = settings.upcycle is not None and timm.is_model(settings.model), settings.to_dict()
    try:
        save_pretrained(
            model,
            folder,
            state_dict=state,
            model_args=settings.model_args if is_upcycled else None,
            preprocessing={name: values[name] for name in PREPROCESSING},
        )
    except CheckpointError as error:
        if isinstance(error.__cause__, (OSError, SafetensorError)):  # the folder cannot be written
            raise
        make_output(folder)
        (folder / CONFIG).unlink(missing_ok=True)
        tensors = {name: tensor.clone() for name, tensor in state.items()}  # safetensors refuses shared tensors
        write_whole(folder / WEIGHTS, lambda path: path.write_bytes(save(tensors)))
        return str(error)
    return ""
