"""Softmax Expert Choice against Softmax Token Choice with equal weights of the auxiliary losses, from the ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmoe_routers.study.ablation_rows import ablation_groups
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.comparisons import Comparison, Pair, correct, mean_of, paired_test
from vmoe_routers.study.summary import MEASURES, Run, Stat, stat

_ABLATIONS = ("aux_loss", "aux_loss_token_choice")  # of Expert Choice and of Token Choice
_WEIGHTS = [arm.label for arm in ABLATIONS[_ABLATIONS[0]].arms]


class EqualLosses(NamedTuple):
    """Softmax Expert Choice minus Softmax Token Choice by one measure, at capacity factor 1 and K = 1.

    Attributes:
        test: The test of the mean over the weights, seed by seed. Holm's correction covers all measures.
        seeds: The seeds that have runs of all weights.
        weights: The mean difference at every weight.
    """

    test: Comparison
    seeds: list[int]
    weights: Mapping[str, Stat]


def equal_losses(runs: Sequence[Run]) -> list[EqualLosses]:
    """Compares both routers by every measure. Returns an empty list unless one seed has runs of all weights."""
    groups = {
        (group.ablation, group.arm.label): {run["seed"]: run for run in group.runs}
        for group in ablation_groups(runs)
        if group.ablation in _ABLATIONS
    }
    of = [[groups.get((name, weight), {}) for name in _ABLATIONS] for weight in _WEIGHTS]
    seeds = sorted(set.intersection(*(set(group) for both in of for group in both)))
    if not seeds:
        return []
    tests, weights = [], []
    for name, measure in MEASURES.items():
        pairs = [
            Pair(weight, None, {seed: measure.of(expert[seed]) - measure.of(token[seed]) for seed in seeds})
            for weight, (expert, token) in zip(_WEIGHTS, of, strict=True)
        ]
        tests.append(paired_test("equal losses", name, mean_of(pairs)))
        weights.append({pair.what: stat(pair.differences.values()) for pair in pairs})
    return [EqualLosses(test, seeds, by) for test, by in zip(correct(tests), weights, strict=True)]


def verdict_of(found: Sequence[EqualLosses]) -> str:
    """Says in sentences whether Softmax Expert Choice is better at equal weights, as a mean over the weights."""
    seeds = found[0].seeds
    said = [
        '"With equal weights of the auxiliary losses, Softmax Expert Choice is better than Softmax Token Choice" is '
        f"{' and '.join(_verdict(one.test) for one in found)}. The means are over the weights {', '.join(_WEIGHTS)} "
        f"and the {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}."
    ]
    if any(one.test.p_holm is not None for one in found):
        said.append("The p-values have Holm's correction for two tests. The intervals have no correction.")
    return " ".join(said)


def _verdict(test: Comparison) -> str:
    if test.mean is None:
        return f"not comparable by the {test.measure} ({test.reason})"
    measure = MEASURES[test.measure]
    words = f"mean difference {measure.scale * test.mean:{measure.form}} {measure.unit}"
    if test.low is not None and test.high is not None and test.p_holm is not None:
        low, high = (format(measure.scale * value, measure.form) for value in (test.low, test.high))
        words += f", 95 % interval {low} to {high}, p = {test.p_holm:.2g}"
    return f"{test.verdict} by the {test.measure} ({words})"
