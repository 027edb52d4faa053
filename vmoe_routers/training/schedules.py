"""Learning rates by step: the schedules of the authors' reference code."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "rsqrt", "constant")


def learning_rate(
    step: int,
    steps: int,
    *,
    schedule: str,
    peak: float,
    final: float = 0.0,
    warmup: int = 0,
    timescale: int = 10_000,
    cooldown: int = 0,
) -> float:
    """Computes the learning rate of a step.

    Args:
        step: The step's number, from 0.
        steps: Number of steps of the training.
        schedule: After the warm-up, "cosine" and "linear" go from `peak` at step `warmup` to `final` at step `steps`.
            "rsqrt" is ``peak / sqrt(1 + (step - warmup) / timescale)``. "constant" is `peak`.
        peak: Largest learning rate.
        final: Last learning rate of "cosine" and "linear".
        warmup: Steps in which the rate rises linearly from 0 to `peak`.
        timescale: Steps after which "rsqrt" has divided the rate by sqrt(2).
        cooldown: Last steps of "rsqrt" and "constant", in which the rate falls linearly to `final`.
    """
    if step < warmup:
        return peak * step / warmup
    if schedule in ("cosine", "linear"):
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return final + (peak - final) * left
    start = max(warmup, steps - cooldown)  # first step of the cool-down
    at = min(step, start)
    rate = peak / math.sqrt(1 + (at - warmup) / timescale) if schedule == "rsqrt" else peak
    if step > start:
        rate += (final - rate) * min(1.0, (step - start) / cooldown)
    return rate
