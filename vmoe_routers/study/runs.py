"""One run: a variant trained from a seed, and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vmoe_routers.machine import here_and_now
from vmoe_routers.models.cost import cost
from vmoe_routers.study.records import evaluated_epochs
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.variants import Variant, build
from vmoe_routers.training import Evaluation, Images, evaluate_model, few_shot_accuracy, train


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
    epochs: list[dict[str, float]] = []
    evaluations: list[Evaluation] = []

    def after(epoch) -> None:
        if epoch.epoch in evaluated_epochs(settings.epochs):
            batches = zip(data.test_images.split(batch), data.test_labels.split(batch), strict=True)
            evaluation = evaluate_model(model, batches, data.num_classes)
            evaluations.append(evaluation)
            epochs.append({**asdict(epoch), "accuracy": evaluation.top1, "loss": evaluation.loss})
        on_epoch()

    steps = train(model, data, settings.recipe(seed), after)
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


def _layers(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The metrics of the MoE layers, with the number of the block in place of the layer's name."""
    return [{"block": int(name.split(".")[1]), **metrics} for name, metrics in evaluation.layers.items()]


@torch.no_grad()
def _transfer(model: VisionTransformer, data: Images, batch: int, seed: int) -> dict[str, Any]:
    """10-shot accuracy of a probe on the features before the head."""
    model.eval()
    device = next(model.parameters()).device

    def features(images: Tensor) -> Tensor:
        parts = [model.forward_head(model.forward_features(x.to(device)), pre_logits=True) for x in images.split(batch)]
        return torch.cat(parts).cpu()

    accuracy = few_shot_accuracy(
        features(data.train_images), data.train_labels, features(data.test_images), data.test_labels, seed=seed
    )
    return {"data": data.name, "accuracy": accuracy}
