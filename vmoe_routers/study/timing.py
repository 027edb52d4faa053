"""Measures the time of a training step of every variant, in turns in one process.

Times measured during the runs cannot be compared, because several runs train at once and the load of the machine
changes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from vmoe_routers.machine import here_and_now
from vmoe_routers.study.images import StudyData, first_images
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.variants import Variant, build
from vmoe_routers.training import Trainer

ROUNDS = 25  # every round times one step of every variant, in a random order
WARM_UP = 3


def time_steps(
    settings: Settings, variants: Sequence[Variant], data: StudyData, on_round: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Times training steps on one batch.

    Returns:
        The record: step_ms (the times of a variant, one per round, by its name), machine and date.
    """
    images, labels = first_images(settings, data, settings.batch_size)
    trainers: dict[str, Trainer] = {}
    for variant in variants:
        model = build(variant, settings, data, seed=0).train()
        chosen = variant.settings(settings).optimisation()
        # The warm-up and the cool-down of a recipe may have more steps than are timed.
        short = replace(chosen, warmup=min(chosen.warmup, 0.1), cooldown=min(chosen.cooldown, 0.1))
        trainers[variant.name] = Trainer(model, short, WARM_UP + ROUNDS)
    order = random.Random(0)
    step_ms: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(WARM_UP + ROUNDS):
        for name in order.sample(list(trainers), len(trainers)):
            start = time.perf_counter()
            trainers[name](images, labels)
            if images.is_cuda:
                torch.cuda.synchronize(images.device)
            if turn >= WARM_UP:
                step_ms[name].append(1e3 * (time.perf_counter() - start))
        on_round()
    return {"step_ms": step_ms, **here_and_now()}
