"""The one timer: all variants in one process, shuffled per round, paired ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

AGAIN = "ours (again)"
UNSTABLE = 0.10
WIDE = 0.30


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios and its bootstrap 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Median seconds, and the ratio of the variant's time to the base's: above 1 the base is faster."""

    seconds: float
    ratio: Ratio


def bootstrap(values: list[float], draws: int = 1000, seed: int = 0) -> Ratio:
    """The median of `values` with its percentile interval."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return Ratio(statistics.median(values), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1])


def once(call: Callable[[], object], repeats: int, device: str) -> float:
    """Seconds a call, over `repeats` of them."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def device_seconds(call: Callable[[], object], calls: int = 5) -> float:
    """Seconds a call that the GPU is busy with it, whatever the host takes to ask for that."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6 / calls


def repeats_for(call: Callable[[], object], device: str, least: float) -> int:
    """How many calls make a measurement of at least `least` seconds; warms up as well."""
    once(call, 1, device)
    # The faster of two: a disturbance here would make every measurement too short.
    seconds, repeats = min(once(call, 1, device) for _ in range(2)), 1
    while seconds * repeats < least and repeats < 1 << 16:
        repeats = max(repeats * 2, min(1 << 16, int(least / max(seconds, 1e-9)) + 1))
        seconds = min(once(call, repeats, device) for _ in range(2))
    return repeats


def measure(
    calls: dict[str, Callable[[], object]], *, rounds: int = 15, least: float = 2e-3, device: str = "cpu", seed: int = 0
) -> tuple[dict[str, Timing], Ratio]:
    """Times `calls`; the first is the base, and runs twice in a round, which gives the A/A ratio.

    A call of a millisecond or less is repeated within its measurement, so that one lasts `least` seconds.
    """
    base = next(iter(calls))
    calls = {**calls, AGAIN: calls[base]}
    repeats = {name: repeats_for(call, device, least) for name, call in calls.items() if name != AGAIN}
    repeats[AGAIN] = repeats[base]
    rng, names = random.Random(seed), list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        rng.shuffle(names)
        for name in names:
            seconds[name].append(once(calls[name], repeats[name], device))

    def ratio(name: str) -> Ratio:
        return bootstrap([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])

    again = ratio(AGAIN)
    return {name: Timing(statistics.median(seconds[name]), ratio(name)) for name in calls if name != AGAIN}, again


def is_unstable(again: Ratio) -> bool:
    """Whether the same code measured twice came out more than 10 % apart, or might have come out 30 % apart."""
    return abs(again.median - 1) > UNSTABLE or again.low < 1 - WIDE or again.high > 1 + WIDE
