"""Meter: the values of the log, collected between two rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vmoe_routers import inspect
from vmoe_routers.moe import MoEMlp
from vmoe_routers.training.loader import Batches
from vmoe_routers.training.processes import World
from vmoe_routers.training.trainer import StepReport, Trainer

ROUTING = ("load_cv", "dropped", "utilisation")
"""Metrics of `Routing.metrics` in the log: means over the MoE layers."""


class Meter:
    """Collects the values of the steps since the last row. Only `row` waits for the device.

    Args:
        trainer: The training.
        batches: Its batches, which count the time spent waiting for data.
        world: The processes. Losses and metrics are means over them.
    """

    def __init__(self, trainer: Trainer, batches: Batches, world: World):
        self.trainer, self.batches, self.world = trainer, batches, world
        self.has_layers = any(isinstance(module, MoEMlp) for module in trainer.plain.modules())
        self.restart()

    def restart(self) -> None:
        """Begins a new row, without the time of an evaluation."""
        self.images, self.waited, self.begin = 0, self.batches.waited, time.perf_counter()
        self.reports: list[StepReport] = []
        self.metrics: dict[str, torch.Tensor] = {}

    @contextmanager
    def recording(self, wanted: bool) -> Iterator[None]:
        """Records the routing metrics of a step, if wanted and if the model has MoE layers."""
        if not (wanted and self.has_layers):
            yield
            return
        with inspect.record(self.trainer.plain) as trace:
            yield
        routings = [routing for layer in trace.routings.values() for routing in layer]
        if routings:
            metrics = [routing.metrics for routing in routings]
            self.metrics = {name: torch.stack([m[name].detach().float() for m in metrics]).mean() for name in ROUTING}

    def add(self, report: StepReport, images: int) -> None:
        """Adds a step of `images` images on this process."""
        self.reports.append(report)
        self.images += images * self.world.size

    def row(self, steps_per_epoch: int) -> dict[str, Any]:
        """The values since the last row. Every process must call it."""
        trainer = self.trainer
        losses = torch.stack([torch.stack([r.loss.float(), r.aux_loss.float()]) for r in self.reports]).mean(0)
        values = torch.cat([losses, *(self.metrics[name].view(1) for name in self.metrics)])
        means = dict(zip(("loss", "aux_loss", *self.metrics), self.world.mean(values).tolist(), strict=True))
        norm = float(self.reports[-1].grad_norm)  # waits for the device, so the time below is that of finished steps
        now = time.perf_counter()
        row = {
            "step": trainer.step,
            "epoch": trainer.step / steps_per_epoch,
            "loss": means["loss"],
            "aux_loss": means["aux_loss"],
            "grad_norm": norm,
            "learning_rate": self.reports[-1].learning_rate,
            "images_per_second": self.images / (now - self.begin),
            "data_wait": (self.batches.waited - self.waited) / (now - self.begin),
            **{name: means.get(name, "") for name in ROUTING},
            "skipped_steps": trainer.skipped,
            "bad_images": self.batches.skipped,
        }
        self.restart()
        return row
