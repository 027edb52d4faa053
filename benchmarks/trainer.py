"""Measures the time that the training loop adds to a step, and the growth of its memory.

    python -m benchmarks.trainer

A bare step is the step that a user would write by hand: forward, cross-entropy and auxiliary loss, backward, clipping
by torch, fused AdamW. `vmoe_routers.training.train` trains on digits. After each of its steps, a bare step trains an
equal model on the same batch. The loop's time is the time from the end of one bare step to the beginning of the next
one. So the time has the step of `Trainer`, the data, the log and the routing metrics. Two bare steps follow each other,
and their ratio shows the noise of the measurement. All times are processor times of this process, which other programs
on the machine disturb less than elapsed times.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import vmoe_routers as vr
from vmoe_routers.machine import here_and_now
from vmoe_routers.models import vit_moe
from vmoe_routers.training import Trainer, TrainSettings, train

LOG_EVERY = 10  # steps of a window: one of them is logged
# The optimizer has the settings of AdamW in `bare_step`, so that the models stay alike: the time of the experts depends
# on their load.
SETTINGS = TrainSettings(
    data="digits",
    image_size=32,
    model_args={"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3},
    router="softmax_token_choice",
    num_experts=8,
    group_size=8,
    scale=None,
    hflip=0.0,
    shift=1,
    schedule="constant",
    warmup=0.0,
    weight_decay=0.01,
    epochs=2,
    batch_size=16,
    workers=0,
    log_every=LOG_EVERY,
    evaluate_every=1_000_000,
    save_every=1_000_000,
    keep=["last"],
    device="cpu",
)


def make_model() -> nn.Module:
    """Makes the ViT-MoE of the training."""
    torch.manual_seed(0)
    return vit_moe(32, 4, 1, 10, 96, 4, 3, router="softmax_token_choice", num_experts=8, group_size=8).train()


def bare_step(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Makes the step as a user would write it by hand."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(images), labels)
        (loss + vr.aux_loss(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


class Times:
    """Seconds per step of the loop, of the step of `Trainer` in it, and of two bare steps after it."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"loop": [], "Trainer": [], "bare": [], "bare again": []}
        self._bare = [bare_step(make_model()), bare_step(make_model())]
        self._end = time.process_time()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Measures the steps of all `Trainer` within the context."""
        call = Trainer.__call__

        def step(trainer: Trainer, images: torch.Tensor, targets: torch.Tensor):
            begin = time.process_time()
            report = call(trainer, images, targets)
            end = time.process_time()
            self.seconds["loop"].append(end - self._end)
            self.seconds["Trainer"].append(end - begin)
            for name, bare in zip(("bare", "bare again"), self._bare, strict=True):
                begin = time.process_time()
                bare(images, targets)
                self._end = time.process_time()
                self.seconds[name].append(self._end - begin)
            return report

        with patch.object(Trainer, "__call__", step):
            yield

    def ratio(self, name: str) -> float:
        """Computes the median over windows of `LOG_EVERY` steps: time of `name` by time of bare steps."""
        return statistics.median(a / b for a, b in zip(self._windows(name), self._windows("bare"), strict=True))

    def median(self, name: str) -> float:
        """Computes the median time of a step in a window, in seconds."""
        return statistics.median(self._windows(name)) / LOG_EVERY

    def _windows(self, name: str) -> list[float]:
        times = self.seconds[name]
        # The first window has the first steps, which are slower.
        return [sum(times[i : i + LOG_EVERY]) for i in range(LOG_EVERY, len(times) - LOG_EVERY + 1, LOG_EVERY)]


def resident_bytes() -> int:
    """Returns the resident memory of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def run(settings: TrainSettings) -> None:
    """Trains in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        train(replace(settings, output=Path(folder)), console=Console(quiet=True))


def memory() -> list[int]:
    """Trains a narrow model. Returns the resident memory after 100 and 1,000 steps."""
    found, call = [], Trainer.__call__

    def step(trainer: Trainer, images: torch.Tensor, targets: torch.Tensor):
        if trainer.step in (100, 1000):
            found.append(resident_bytes())
        return call(trainer, images, targets)

    narrow = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with patch.object(Trainer, "__call__", step):
        run(replace(SETTINGS, model_args=narrow, batch_size=8, epochs=6, ema=0.99))
    return found


def main() -> None:
    """Prints the overhead of the loop and the growth of its memory."""
    torch.set_num_threads(1)
    print(here_and_now())
    first, last = memory()
    print(f"memory after 100 and 1,000 steps: {first / 1e6:.1f} and {last / 1e6:.1f} MB")
    times = Times()
    with times.measuring():
        run(SETTINGS)
    for name in times.seconds:
        print(f"{name}: {1e3 * times.median(name):.1f} ms per step, {times.ratio(name):.3f} of a bare step")


if __name__ == "__main__":
    main()
