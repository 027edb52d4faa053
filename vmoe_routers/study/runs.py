"""One run: a variant trained from a seed, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vmoe_routers.checkpoints import save_pretrained
from vmoe_routers.machine import here_and_now
from vmoe_routers.models.cost import cost
from vmoe_routers.study.images import StudyData, batches_of_evaluation, batches_of_training, split
from vmoe_routers.study.records import evaluated_epochs, of_run
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.variants import Variant, build
from vmoe_routers.training import Evaluation, Images, Trainer, evaluate_model, few_shot_accuracy
from vmoe_routers.training.probes import features_of
from vmoe_routers.training.samples import Samples
from vmoe_routers.training.trainer import TrainingError
from vmoe_routers.training.transforms import PREPROCESSING, Mixing


def run(
    settings: Settings,
    variant: Variant,
    seed: int,
    data: StudyData,
    transfer: Images | None,
    on_epoch: Callable[[], None] = lambda: None,
    folder: Path | None = None,
) -> dict[str, Any]:
    """Trains a variant from a seed and measures it.

    Args:
        settings: The study's settings.
        variant, seed: The run.
        data, transfer: The images, and the images of the second data set.
        on_epoch: A function that is called after every epoch.
        folder: The folder for the trained model, for `from_pretrained`; None keeps no model.

    Returns:
        The record that `vmoe_routers.study.summary` describes.
    """
    given, settings = settings, variant.settings(settings)
    model = build(variant, settings, data, seed)
    # The largest multiple of the group size up to 512, or one group.
    batch = max(settings.group_size, 512 // settings.group_size * settings.group_size)
    trained, curve = split(data, settings.holdout)
    final = curve if settings.choosing else data.test
    steps_per_epoch = len(trained) // settings.batch_size
    steps = steps_per_epoch * settings.epochs
    epochs: list[dict[str, float]] = []
    measured = None
    trainer = Trainer(model.train(), settings.optimisation(), steps, seed=seed)
    seconds, diverged, mix = 0.0, None, None
    augmentation = settings.augmentation(data.size)
    if augmentation.mixes:
        mix = Mixing(augmentation, data.num_classes, seed=seed)
    with batches_of_training(settings, data, trained, seed, steps) as batches:
        for epoch in range(1, settings.epochs + 1):
            start = time.perf_counter()
            losses, images = [], None
            for images, targets, _ in islice(batches, steps_per_epoch):
                if mix is not None:
                    images, targets = mix(images, targets, trainer.step)
                losses.append(trainer(images, targets).loss)
            train_loss = float(torch.stack(losses).mean())  # waits for the device
            try:
                trainer.check(cast(Tensor, images))
            except TrainingError as error:
                diverged = str(error)
                break
            seconds += time.perf_counter() - start
            if epoch in evaluated_epochs(settings.epochs):
                measured = _measure(model, settings, data, curve, batch)
                values = {"train_loss": train_loss, "accuracy": measured.top1, "loss": measured.loss}
                epochs.append({"epoch": epoch, "seconds": seconds, **values})
            on_epoch()
    # If the curve and the final evaluation use the same images, the last evaluation of the curve is the final one.
    if measured is None or diverged or final is not curve:
        measured = _measure(model, settings, data, final, batch)
    if folder is not None:
        preprocessing = {name: getattr(augmentation, name) for name in PREPROCESSING}
        save_pretrained(model, folder, preprocessing=preprocessing)
    return {
        "variant": variant.describe(),
        "seed": seed,
        "settings": of_run(given, variant),
        "epochs": epochs,
        "final": {"accuracy": measured.top1, "loss": measured.loss},
        "diverged": diverged,
        "steps": steps,
        "cost": cost(model),
        "layers": _layers(measured),
        "transfer": None if transfer is None else _transfer(model, transfer, batch, seed),
        **here_and_now(),
    }


def _measure(model: VisionTransformer, settings: Settings, data: StudyData, samples: Samples, batch: int) -> Evaluation:
    with batches_of_evaluation(settings, data, samples, batch) as batches:
        return evaluate_model(model, batches, data.num_classes)


def _layers(evaluation: Evaluation) -> list[dict[str, Any]]:
    """Lists the metrics of the MoE layers by the number of the block."""
    return [{"block": int(name.split(".")[1]), **metrics} for name, metrics in evaluation.layers.items()]


def _transfer(model: VisionTransformer, data: Images, batch: int, seed: int) -> dict[str, Any]:
    """Measures the 10-shot accuracy of a probe on the features before the head."""
    parts = ((data.train_images, data.train_labels), (data.test_images, data.test_labels))
    train, test = (
        features_of(model, zip(images.split(batch), labels.split(batch), strict=True)) for images, labels in parts
    )
    return {"data": data.name, "accuracy": few_shot_accuracy(*train, *test, seed=seed)}
