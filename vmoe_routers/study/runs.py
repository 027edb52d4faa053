"""One run: a variant trained from a seed, and measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from vmoe_routers.machine import here_and_now
from vmoe_routers.models.cost import cost
from vmoe_routers.study.records import evaluated_epochs
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.variants import Variant, build
from vmoe_routers.training import Evaluation, Images, Trainer, evaluate_model, few_shot_accuracy
from vmoe_routers.training.loader import Batches, training_batches
from vmoe_routers.training.probes import features_of
from vmoe_routers.training.samples import Tensors
from vmoe_routers.training.transforms import Augmentation, Transform


def run(
    settings: Settings,
    variant: Variant,
    seed: int,
    data: Images,
    transfer: Images | None,
    on_epoch: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains a variant from a seed and measures it. Returns the record that `vmoe_routers.study.summary` describes."""
    model = build(variant, settings, data, seed)
    # The largest multiple of the group size up to 512, or one group.
    batch = max(settings.group_size, 512 // settings.group_size * settings.group_size)
    steps_per_epoch = len(data.train_labels) // settings.batch_size
    steps = steps_per_epoch * settings.epochs
    epochs: list[dict[str, float]] = []
    evaluations: list[Evaluation] = []
    trainer = Trainer(model.train(), settings.optimisation(), steps, seed=seed)
    seconds = 0.0
    with shifted_batches(settings, data, seed, steps) as batches:
        for epoch in range(1, settings.epochs + 1):
            start = time.perf_counter()
            losses = [trainer(images, labels).loss for images, labels, _ in islice(batches, steps_per_epoch)]
            train_loss = float(torch.stack(losses).mean())  # waits for the device
            seconds += time.perf_counter() - start
            if epoch in evaluated_epochs(settings.epochs):
                test = zip(data.test_images.split(batch), data.test_labels.split(batch), strict=True)
                found = evaluate_model(model, test, data.num_classes)
                evaluations.append(found)
                values = {"train_loss": train_loss, "accuracy": found.top1, "loss": found.loss}
                epochs.append({"epoch": epoch, "seconds": seconds, **values})
            on_epoch()
    return {
        "variant": variant.describe(),
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "cost": cost(model),
        "layers": _layers(evaluations[-1]),
        "transfer": None if transfer is None else _transfer(model, transfer, batch, seed),
        **here_and_now(),
    }


def shifted_batches(settings: Settings, data: Images, seed: int, steps: int) -> Batches:
    """Makes the batches of a run. Order and random shifts depend on the seed and are the same for all variants."""
    augmentation = Augmentation(image_size=data.size, scale=None, hflip=0.0, shift=settings.shift, normalization="none")
    return training_batches(
        Tensors(data.train_images, data.train_labels),
        Transform(augmentation, data.channels, training=True),
        batch_size=settings.batch_size,
        steps=steps,
        seed=seed,
        device=settings.device,
    )


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
