"""One run: a variant trained from a seed, and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from vmoe_routers import inspect
from vmoe_routers.machine import here_and_now
from vmoe_routers.models.cost import cost
from vmoe_routers.moe import MoEMlp
from vmoe_routers.study.records import evaluated_epochs
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.variants import Variant, build
from vmoe_routers.training import Images, evaluate, few_shot_accuracy, train


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

    def after(epoch) -> None:
        if epoch.epoch in evaluated_epochs(settings.epochs):
            accuracy, loss = evaluate(model, data.test_images, data.test_labels, batch)
            epochs.append({**asdict(epoch), "accuracy": accuracy, "loss": loss})
        on_epoch()

    steps = train(model, data, settings.recipe(seed), after)
    statistics_of = _LayerStatistics(model.eval())
    for images in data.test_images.split(batch):
        statistics_of.add(images)
    return {
        "variant": variant.describe(),
        "seed": seed,
        "epochs": epochs,
        "steps": steps,
        "cost": cost(model),
        "layers": statistics_of.means(),
        "transfer": None if transfer is None else _transfer(model, transfer, batch, seed),
        **here_and_now(),
    }


class _LayerStatistics:
    """The metrics of the MoE layers, averaged over images that come in batches."""

    def __init__(self, model: VisionTransformer):
        self.model = model
        self.images = 0
        blocks = [i for i, block in enumerate(model.blocks) if isinstance(block.mlp, MoEMlp)]
        self.sums: dict[int, dict[str, Tensor]] = {block: {} for block in blocks}

    @torch.no_grad()
    def add(self, images: Tensor) -> None:
        """Runs the model, which must be in eval mode, on a batch and adds the metrics of its layers."""
        self.images += len(images)
        if not self.sums:
            return
        with inspect.record(self.model) as trace:
            self.model(images.to(next(self.model.parameters()).device))
        for block, sums in self.sums.items():
            routings = trace.routings[f"blocks.{block}.mlp"]
            # A last group that is smaller than the others has a separate routing.
            total = sum(routing.num_groups * routing.num_tokens for routing in routings)
            for routing in routings:
                share = len(images) * routing.num_groups * routing.num_tokens / total
                metrics = {name: value.double() for name, value in routing.metrics.items()}
                load, utilisation = metrics.pop("load").sum(0), metrics.pop("utilisation")
                slots = routing.num_groups * routing.num_experts * routing.capacity
                found = {name: value * share for name, value in metrics.items()}
                found |= {"load": load, "filled": utilisation * slots, "slots": load.new_tensor(slots)}
                for name, value in found.items():
                    sums[name] = sums[name] + value if name in sums else value

    def means(self) -> list[dict[str, Any]]:
        """One dict per layer: the loads per image and the means of the other metrics, over all images."""
        layers = []
        for block, sums in self.sums.items():
            sums = dict(sums)
            load, utilisation = sums.pop("load") / self.images, float(sums.pop("filled") / sums.pop("slots"))
            layer = {name: float(value / self.images) for name, value in sums.items()} | {"utilisation": utilisation}
            layer["load_cv"] = float(load.std(correction=0) / load.mean())
            layer["dead_experts"] = int((load == 0).sum())
            layers.append({"block": block, "load": load.tolist(), **layer})
        return layers


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
