"""The timer of all benchmarks: paired ratios of calls that run in one process, in shuffled rounds."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

AGAIN = "ours (again)"
UNSTABLE = 0.10  # largest deviation of the median A/A ratio from 1
WIDE = 0.30  # largest deviation of the ends of the median's interval from 1


@dataclass(frozen=True)
class Ratio:
    """Median of the paired ratios and its bootstrap 95 % interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Median and least seconds, and the ratio to the time of the base.

    A ratio above 1 means that the base is faster.
    """

    seconds: float
    fastest: float
    ratio: Ratio


def bootstrap(values: list[float], draws: int = 1000, seed: int = 0) -> Ratio:
    """Returns the median of `values` with its bootstrap percentile interval."""
    rng = random.Random(seed)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(draws))
    return Ratio(statistics.median(values), medians[int(0.025 * draws)], medians[int(0.975 * draws) - 1])


def once(call: Callable[[], object], repeats: int, device: str) -> float:
    """Returns the mean seconds per call of `repeats` calls.

    On a GPU, the clock of the GPU measures these seconds. They include the time in which Python launches the calls.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        return _between_events(call, repeats)[0]
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _between_events(call: Callable[[], object], repeats: int) -> tuple[float, bool]:
    """Returns the seconds per call by the GPU's clock, and whether Python launched all calls before the first began."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    ahead = not start.query()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end) / repeats, ahead


class Queued:
    """Measures the seconds of a call on the GPU, without the time that Python needs to launch it.

    The GPU sleeps until enough calls are in its queue, and then runs them one after another.
    """

    LEAST = 1e-3  # the least seconds of a measurement, some hundred kernels; a queue holds a thousand kernels
    LONGEST = 0.05  # the most seconds of launches for which the GPU sleeps
    CYCLES = 2e9  # cycles per second of the fastest GPU

    def __init__(self, call: Callable[[], object]):
        self._call, self._repeats = call, repeats_for(call, "cuda", self.LEAST)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(self._repeats):
            call()
        asking = min(time.perf_counter() - start, self.LONGEST)
        self._wait = int(2 * asking * self.CYCLES)
        self._ahead: list[bool] = []

    def __call__(self) -> float:
        torch.cuda.synchronize()
        torch.cuda._sleep(self._wait)
        seconds, ahead = _between_events(self._call, self._repeats)
        self._ahead.append(ahead)
        return seconds

    @property
    def waits(self) -> bool:
        """Whether the time includes Python, because the call synchronises or has too many kernels to queue."""
        return 2 * sum(self._ahead) < len(self._ahead)


def repeats_for(call: Callable[[], object], device: str, least: float) -> int:
    """Warms up, and returns the number of calls that take at least `least` seconds."""
    once(call, 1, device)
    # Take the faster of two: a disturbed estimate would make every measurement too short.
    seconds, repeats = min(once(call, 1, device) for _ in range(2)), 1
    while seconds * repeats < least and repeats < 1 << 16:
        repeats = max(repeats * 2, min(1 << 16, int(least / max(seconds, 1e-9)) + 1))
        seconds = min(once(call, repeats, device) for _ in range(2))
    return repeats


def measure(
    calls: dict[str, Callable[[], object]], *, rounds: int = 15, least: float = 2e-3, device: str = "cpu"
) -> tuple[dict[str, Timing], Ratio]:
    """Measures `calls` with `paired`. A measurement repeats a call until `least` seconds have passed."""
    repeats = {name: repeats_for(call, device, least) for name, call in calls.items()}
    return paired({name: partial(once, call, repeats[name], device) for name, call in calls.items()}, rounds=rounds)


def paired(
    measurements: dict[str, Callable[[], float]], *, rounds: int = 15, seed: int = 0
) -> tuple[dict[str, Timing], Ratio]:
    """Runs the measurements in shuffled rounds.

    Returns:
        The timing of every measurement, with the first measurement as the base of the ratios; and the A/A ratio, the
        ratio of a second measurement of the base in every round to the first.
    """
    base = next(iter(measurements))
    measurements = {**measurements, AGAIN: measurements[base]}
    rng, names = random.Random(seed), list(measurements)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        rng.shuffle(names)
        for name in names:
            seconds[name].append(measurements[name]())

    def ratio(name: str) -> Ratio:
        return bootstrap([a / b for a, b in zip(seconds[name], seconds[base], strict=True)])

    again = ratio(AGAIN)
    timings = {
        name: Timing(statistics.median(seconds[name]), min(seconds[name]), ratio(name))
        for name in measurements
        if name != AGAIN
    }
    return timings, again


def is_unstable(again: Ratio) -> bool:
    """Tells whether two measurements of the same code differ by more than 10 %, or may differ by more than 30 %."""
    return abs(again.median - 1) > UNSTABLE or again.low < 1 - WIDE or again.high > 1 + WIDE
