"""Softmax Expert Choice against Softmax Token Choice with equal weights of the auxiliary losses, from the ablations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vmoe_routers.study.ablation_rows import ablation_groups
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.comparisons import Comparison, Pair, correct, mean_of, paired_test
from vmoe_routers.study.summary import MEASURES, Run, Stat, layer_mean, stat

_EXPERT, _TOKEN = "aux_loss", "aux_loss_token_choice"  # the ablations of Expert Choice and of Token Choice
WEIGHTS = [arm.label for arm in ABLATIONS[_EXPERT].arms]
"""Weights of the auxiliary losses (importance and load)."""


class EqualAuxLosses(NamedTuple):
    """Softmax Expert Choice and Softmax Token Choice at capacity factor 1 and K = 1, by weight.

    Attributes:
        seeds: The seeds that have runs of all weights.
        differences: Expert Choice minus Token Choice by measure and weight, as statistics over the seeds.
        dropped: The share of tokens that no expert takes, by weight: of Expert Choice and of Token Choice.
        tests: The tests of the mean over the weights, seed by seed: one for each measure, with Holm's correction for
            the number of measures.
    """

    seeds: list[int]
    differences: Mapping[str, Mapping[str, Stat]]
    dropped: Mapping[str, tuple[float | None, ...]]
    tests: list[Comparison]


def equal_aux_losses(runs: Sequence[Run]) -> EqualAuxLosses | None:
    """Compares both routers. Returns None unless one seed has runs of all weights."""
    groups = {
        (group.ablation, group.arm.label): {run["seed"]: run for run in group.runs} for group in ablation_groups(runs)
    }
    expert, token = ([groups.get((name, weight), {}) for weight in WEIGHTS] for name in (_EXPERT, _TOKEN))
    seeds = sorted(set.intersection(*map(set, (*expert, *token))))
    if not seeds:
        return None
    differences, tests = {}, []
    for name, measure in MEASURES.items():
        pairs = [
            Pair(weight, None, {seed: measure.of(first[seed]) - measure.of(second[seed]) for seed in seeds})
            for weight, first, second in zip(WEIGHTS, expert, token, strict=True)
        ]
        differences[name] = {pair.what: stat(pair.differences.values()) for pair in pairs}
        tests.append(paired_test("equal auxiliary losses", name, mean_of(pairs)))
    dropped = {
        weight: tuple(layer_mean([of[seed] for seed in seeds], "dropped") for of in (first, second))
        for weight, first, second in zip(WEIGHTS, expert, token, strict=True)
    }
    return EqualAuxLosses(seeds, differences, dropped, correct(tests, len(tests)))


def verdict_of(found: EqualAuxLosses) -> str:
    """Says in sentences whether Softmax Expert Choice is better at equal weights, as a mean over the weights."""
    said = [
        '"With equal weights of the auxiliary losses, Softmax Expert Choice is better than Softmax Token Choice" is '
        f"{' and '.join(map(_verdict, found.tests))}. The means are over the weights {', '.join(WEIGHTS)} and the "
        f"{'seed' if len(found.seeds) == 1 else 'seeds'} {', '.join(map(str, found.seeds))}."
    ]
    if any(test.p_holm is not None for test in found.tests):
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
