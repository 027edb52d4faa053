"""Meter: the values of the log, collected between two rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vmoe_routers.inspect import RoutingStatistics
from vmoe_routers.training.loader import Batches
from vmoe_routers.training.processes import World
from vmoe_routers.training.trainer import StepReport, Trainer

ROUTING = ("load_cv", "dropped", "utilisation")
"""Metrics in the log: means over the MoE layers, for the images of all processes in the last step."""


class Meter:
    """Collects the values of the steps since the last row. Only `row` waits for the device.

    Args:
        trainer: The training.
        batches: Its batches, which count the time spent waiting for data.
        world: The processes. Losses and metrics are over the images of all processes.

    Attributes:
        layers: Metrics of the MoE layers in the step that was recorded last (`RoutingStatistics.layers`).
    """

    def __init__(self, trainer: Trainer, batches: Batches, world: World):
        self.trainer: Trainer = trainer
        self.batches: Batches = batches
        self.world: World = world
        self.layers: dict[str, dict[str, Any]] = {}
        self.restart()

    def restart(self) -> None:
        """Begins a new row, without the time of an evaluation."""
        self.images: int = 0
        self.waited: float = self.batches.waited
        self.begin: float = time.perf_counter()
        self.reports: list[StepReport] = []
        self.statistics: RoutingStatistics | None = None

    @contextmanager
    def recording(self, wanted: bool, valid: Tensor) -> Iterator[None]:
        """Records the routing of a step, if wanted. `valid` [N] bool is as in `Batch`."""
        if not wanted:
            yield
            return
        self.statistics = RoutingStatistics(self.trainer.plain, self.trainer.device)
        with self.statistics.recording(valid):
            yield

    def add(self, report: StepReport, images: int) -> None:
        """Adds a step of `images` images on this process."""
        self.reports.append(report)
        self.images += images * self.world.size

    def row(self, steps_per_epoch: int) -> dict[str, Any]:
        """Computes the values since the last row. Every process must call this method."""
        trainer = self.trainer
        losses = torch.stack([torch.stack([r.loss.float(), r.aux_loss.float()]) for r in self.reports]).mean(0)
        loss, auxiliary = self.world.mean(losses).tolist()
        norm = float(self.reports[-1].grad_norm)  # waits for the device, so that the time below includes all steps
        seconds = time.perf_counter() - self.begin
        row = {
            "step": trainer.step,
            "epoch": trainer.step / steps_per_epoch,
            "loss": loss,
            "aux_loss": auxiliary,
            "grad_norm": norm,
            "learning_rate": self.reports[-1].learning_rate,
            "images_per_second": self.images / seconds,
            "data_wait": (self.batches.waited - self.waited) / seconds,
            **self._routing(),
            "skipped_steps": trainer.skipped,
            "bad_images": self.batches.skipped,
        }
        self.restart()
        return row

    def _routing(self) -> dict[str, Any]:
        """Computes the routing metrics of the recorded step. Gives empty texts if no step was recorded."""
        if self.statistics is None:
            return dict.fromkeys(ROUTING, "")
        # Metrics are ratios of sums over images, so means of the sums over the processes give the same metrics.
        self.statistics.sums = self.world.mean(self.statistics.sums)
        self.layers = self.statistics.layers()
        layers = self.layers.values()
        return {name: sum(layer[name] for layer in layers) / len(layers) if layers else "" for name in ROUTING}
