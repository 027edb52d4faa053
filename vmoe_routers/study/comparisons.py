"""Paired comparisons of two variants over seeds: t-tests, Holm's correction, and the power of a new study."""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy.special import gammaincinv, ndtr, stdtr, stdtrit

from vmoe_routers.study.summary import MEASURES

LEVEL = 0.05
MOST_SEEDS = 1000
POWER = 0.8
_ROUNDING = 1e-12  # differences of accuracy this small come from rounding
Verdict = Literal["supported", "contradicted", "not resolved"]


@dataclass(frozen=True)
class Comparison:
    """Comparison of a claim. Differences of accuracy are in [-1, 1]. Claim vi has rank correlations instead.

    Attributes:
        claim: Key of `vmoe_routers.study.claims.CLAIMS`, or the name of another test.
        measure: Key of `MEASURES`: the result that is compared.
        what: The two variants.
        router: The router that the claim is about, for colours.
        seeds: Number of paired seeds.
        mean: Mean difference; None if the variants cannot be compared.
        low, high: 95 % interval of the mean by Student's t; None for a single seed, and if all seeds have the same
            difference other than 0, because a t-test needs a spread.
        p, p_holm: Two-sided p-value of the paired t-test, without and with Holm's correction; 1 if all differences are
            0, None where the interval is None.
        needed: Seeds with which a new study resolves a true difference of this size and spread with the probability
            `POWER`, at the significance level divided by the number of tests with one correction. None: more than
            `MOST_SEEDS`, or no p-value.
        verdict: The result at the 5 % level after Holm's correction.
        reason: Why the variants cannot be compared.
        is_mean: Whether this is the mean of the claim's comparisons, seed by seed.
    """

    claim: str
    measure: str
    what: str
    router: str | None
    seeds: int = 0
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    p_holm: float | None = None
    needed: int | None = None
    verdict: Verdict = "not resolved"
    reason: str = ""
    is_mean: bool = False


@dataclass(frozen=True)
class Pair:
    """Differences of two variants by seed, or the reason why there are none."""

    what: str
    router: str | None
    differences: Mapping[int, float]
    reason: str = ""
    is_mean: bool = False


def mean_of(pairs: Sequence[Pair]) -> Pair:
    """Takes the mean of the pairs that can be compared, for every seed that all of them have."""
    reasons = {pair.reason for pair in pairs}
    pairs = [pair for pair in pairs if pair.differences]
    seeds = sorted(set.intersection(*(set(pair.differences) for pair in pairs))) if pairs else []
    differences = {seed: statistics.fmean(pair.differences[seed] for pair in pairs) for seed in seeds}
    reason = "" if pairs else reasons.pop() if len(reasons) == 1 else "no comparison is possible"
    return Pair(f"mean of {len(pairs)} comparisons", None, differences, reason, is_mean=True)


def paired_test(claim: str, measure: str, pair: Pair) -> Comparison:
    """Tests the differences of a pair by Student's t, two-sided. The verdict needs `correct`."""
    values = list(pair.differences.values())
    found = Comparison(claim, measure, pair.what, pair.router, len(values), reason=pair.reason, is_mean=pair.is_mean)
    if not values:
        return replace(found, reason=found.reason or "no seed in common")
    if not all(map(math.isfinite, values)):
        return replace(found, reason="a value is not finite")
    mean = statistics.fmean(values)
    found = replace(found, mean=mean)
    if len(values) == 1:
        return found
    if max(values) - min(values) <= _ROUNDING:
        return replace(found, mean=0.0, low=0.0, high=0.0, p=1.0) if abs(mean) <= _ROUNDING else found
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(stdtrit(len(values) - 1, 1 - LEVEL / 2)) * error
    p = 2 * float(stdtr(len(values) - 1, -abs(mean) / error))
    return replace(found, low=mean - half, high=mean + half, p=p)


def correct(made: Sequence[Comparison], count: int = 0) -> list[Comparison]:
    """Judges comparisons with Holm's correction for their number.

    Args:
        made: The comparisons, from `paired_test`.
        count: The number of planned tests; by default, the number of comparisons that have a p-value.
    """
    tested = sorted((found for found in made if found.p is not None), key=lambda found: found.p or 0.0)
    count = count or len(tested)
    adjusted, largest = {}, 0.0
    for place, found in enumerate(tested):
        largest = max(largest, min(1.0, (found.p or 0.0) * (count - place)))
        adjusted[id(found)] = largest
    return [_judge(found, adjusted.get(id(found)), count) for found in made]


def _judge(found: Comparison, p_holm: float | None, tests: int) -> Comparison:
    if p_holm is None or found.mean is None:
        return found
    verdict: Verdict = "not resolved"
    if p_holm < LEVEL:
        verdict = "supported" if found.mean * MEASURES[found.measure].sign > 0 else "contradicted"
    half = (found.high or 0.0) - found.mean
    error = half / float(stdtrit(found.seeds - 1, 1 - LEVEL / 2))
    return replace(
        found,
        p_holm=p_holm,
        verdict=verdict,
        needed=_needed(found.mean, error * math.sqrt(found.seeds), LEVEL / tests),
    )


def _needed(mean: float, deviation: float, level: float) -> int | None:
    if mean == 0:
        return None
    counts = range(2, MOST_SEEDS + 1)
    place = bisect_left(counts, POWER, key=lambda count: power(abs(mean) / deviation, count, level))
    return counts[place] if place < len(counts) else None


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def power(effect: float, seeds: int, level: float = LEVEL) -> float:
    """Computes the probability that a two-sided paired t-test resolves a difference.

    Args:
        effect: The true mean difference, in standard deviations of a difference.
        seeds: The number of pairs, at least 2.
        level: The significance level.
    """
    degrees, shift = seeds - 1, effect * math.sqrt(seeds)
    # The mean over the distribution of the sample deviation, by its quantiles. The probability given the sample
    # deviation is normal. scipy's noncentral t distribution returns NaN for some large effects.
    deviations = np.sqrt(2 * gammaincinv(degrees / 2, (1 + _NODES) / 2) / degrees)
    bounds = stdtrit(degrees, 1 - level / 2) * deviations
    return float(_WEIGHTS @ (ndtr(shift - bounds) + ndtr(-shift - bounds)) / 2)
