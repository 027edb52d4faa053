"""Claims about the routers, decided from the records of a study.

A claim has one or more comparisons. Each compares the final accuracy of two variants, seed by seed, since runs of one
seed share the trunk's initialisation, data order and augmentation. A paired t-test gives the interval and the p-value.
The mean over the comparisons of a claim, seed by seed, decides the claim. Holm's correction covers the claims, and
separately all single comparisons. `decide(runs, "loss")` judges the final loss in the same way, with its own
corrections.

Two budgets are compared: FLOPs of a forward pass, and the time of a training step. If the other model's budget is
between the budgets of the router's capacity factors, the router's accuracy is interpolated linearly over the logarithm
of the budget. A budget at most 15 % outside of the router's range counts as the nearest value.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

from vmoe_routers.files import write_csv
from vmoe_routers.routers import ROUTERS
from vmoe_routers.study.comparisons import Comparison, Pair, correct, mean_of, paired_test
from vmoe_routers.study.styles import short_label, style
from vmoe_routers.study.summary import MEASURES, Measure, Run, accuracy, by_variant, step_ratios
from vmoe_routers.study.variants import base_variant

TOLERANCE = 0.15

CLAIMS: dict[str, str] = {
    "i": "A router is more accurate than the dense ViT at equal FLOPs.",
    "i, time": "A router is more accurate than the dense ViT at equal training time.",
    "ii, softmax": "Softmax Expert Choice is more accurate than Softmax Token Choice with as many slots.",
    "ii, Sinkhorn": "Sinkhorn Expert Choice is more accurate than Sinkhorn Token Choice with as many slots.",
    "iii": "Soft MoE is more accurate than a sparse router at equal FLOPs.",
    "iii, time": "Soft MoE is more accurate than a sparse router at equal training time.",
    "iv": "Sinkhorn Token Choice is more accurate with softmax combine than with plan combine.",
    "v": "Softmax Token Choice is more accurate with batch priority than without.",
    "vi": "Variants that are more accurate are also better in 10-shot transfer.",
}
"""The claims. Claims ii and iii are claims of the paper's abstract (arXiv 2401.15969). The abstract also says that many
routers perform strongly in vision tasks. Claim i is one test of this statement."""


def scale_of(claim: str, measure: str = "accuracy") -> float:
    """Returns the factor to the unit of `measure`. It is 1 for claim vi, which has rank correlations."""
    return 1.0 if claim == "vi" else MEASURES[measure].scale


def text_of(claim: str, measure: str = "accuracy") -> str:
    """Returns the claim as a sentence about `measure`."""
    return CLAIMS[claim].replace(MEASURES["accuracy"].better, MEASURES[measure].better)


def decide(runs: Sequence[Run], measure: Literal["accuracy", "loss"] = "accuracy") -> list[Comparison]:
    """Compares the variants of a study for every claim, in the order of `CLAIMS`.

    The first comparison of a claim is the mean of its comparisons, if there are two or more. Claim vi is about accuracy
    alone.
    """
    pairs: dict[str, list[Pair]] = {}
    for claim, pair in _pairs(_Study(runs), MEASURES[measure]):
        pairs.setdefault(claim, []).append(pair)
    means = [paired_test(claim, measure, mean_of(of) if len(of) > 1 else of[0]) for claim, of in pairs.items()]
    single = [paired_test(claim, measure, pair) for claim, of in pairs.items() if len(of) > 1 for pair in of]
    judged = correct(means) + correct(single)
    return [found for claim in pairs for found in judged if found.claim == claim]


def verdicts(comparisons: Sequence[Comparison]) -> dict[str, str]:
    """Tells the verdict of every claim, and counts the verdicts of its comparisons, in words."""
    found = {}
    for claim in CLAIMS:
        of = [comparison for comparison in comparisons if comparison.claim == claim]
        mean = of[0] if of and of[0].is_mean else None
        of = of[1:] if mean else of
        compared = [comparison for comparison in of if comparison.mean is not None]
        counts = {
            verdict: sum(comparison.verdict == verdict for comparison in compared)
            for verdict in ("supported", "contradicted", "not resolved")
        }
        words = [f"{verdict} in {count}" for verdict, count in counts.items() if count]
        if len(of) > len(compared):
            words.append(f"not comparable in {len(of) - len(compared)}")
        found[claim] = f"{', '.join(words)} of {len(of)}" if of else "not tested"
        if mean is not None:
            found[claim] = f"{mean.verdict} on average; {found[claim]}"
    return found


def remarks(runs: Sequence[Run], by_accuracy: Sequence[Comparison], by_loss: Sequence[Comparison]) -> list[str]:
    """Tells in sentences which claims one correction over both measures decides, and the order of means over seeds.

    Args:
        runs: The records of the runs.
        by_accuracy, by_loss: Their comparisons, from `decide`.
    """
    found = []
    judged = correct([*deciding(by_accuracy).values(), *deciding(by_loss).values()])
    if any(comparison.p is not None for comparison in judged):
        decided = [f"({of.claim}) {of.verdict} by the {of.measure}" for of in judged if of.verdict != "not resolved"]
        words = f"the decided claims are: {'; '.join(decided)}" if decided else "no claim is decided"
        found.append(
            "Accuracy and loss have corrections of their own. With one Holm correction over the claims by both "
            f"measures, {words}."
        )
    order = _order_of_means(runs)
    if order is not None:
        found.append(
            "Claim vi takes the rank correlation in each seed. The rank correlation of the means over seeds is "
            f"{order:+.2f}, without a test. These means have less noise than single runs."
        )
    return found


def deciding(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """Returns the comparison that decides a claim, by claim: the first one."""
    found: dict[str, Comparison] = {}
    for comparison in comparisons:
        found.setdefault(comparison.claim, comparison)
    return found


def write_claims(comparisons: Sequence[Comparison], path: Path | str) -> None:
    """Writes the comparisons as CSV, in full precision. A missing value is empty."""
    write_csv(Path(path), list(map(asdict, comparisons)), [column.name for column in fields(Comparison)])


class _Study:
    """Runs of a study by variant and seed."""

    def __init__(self, runs: Sequence[Run]):
        self.groups = [{run["seed"]: run for run in group} for group in by_variant(runs)]

    def find(self, **options: Any) -> list[dict[int, Run]]:
        """Returns the runs of the variants that have these options, in the order of the capacity factors."""
        found = [
            group
            for group in self.groups
            if all(next(iter(group.values()))["variant"][key] == value for key, value in options.items())
        ]
        return sorted(found, key=lambda group: _variant(group)["capacity_factor"] or 0.0)

    def one(self, **options: Any) -> dict[int, Run] | None:
        """Returns the runs of the variant that has these options; None if there is none."""
        return next(iter(self.find(**options)), None)


def _variant(group: Mapping[int, Run]) -> Mapping[str, Any]:
    return next(iter(group.values()))["variant"]


def _flops_ratio(group: Mapping[int, Run], other: Mapping[int, Run]) -> float:
    mine, others = (next(iter(runs.values()))["cost"]["flops"] for runs in (group, other))
    return mine / others


def _time_ratio(group: Mapping[int, Run], other: Mapping[int, Run]) -> float | None:
    ratios = step_ratios(list(group.values()), list(other.values()))
    return statistics.median(ratios) if ratios else None


class _Budget(NamedTuple):
    name: str
    ratio: Callable[[Mapping[int, Run], Mapping[int, Run]], float | None]


_BUDGETS = {"": _Budget("FLOPs", _flops_ratio), ", time": _Budget("step time", _time_ratio)}
_SPARSE = [router for router in ROUTERS if router != "soft"]


def _base(router: str) -> dict[str, Any]:
    """Returns the options of the variants with K = 1, softmax combine and no batch priority, of any capacity factor."""
    variant = base_variant(router)
    return {"top_k": variant.top_k, "combine": variant.combine, "batch_priority": variant.batch_priority}


def _pairs(study: _Study, measure: Measure) -> Iterator[tuple[str, Pair]]:
    """Yields the claim's key and the pair of every comparison."""
    dense, soft = study.one(router=None), study.find(router="soft")
    routers = list(ROUTERS)
    routers += sorted({_variant(group)["router"] for group in study.groups} - {None, *routers})  # own routers
    for key, budget in _BUDGETS.items():
        for router in routers:
            series = study.find(router=router, **_base(router))
            if dense and series:
                yield f"i{key}", _at_budget(series, dense, budget, measure.of)
    for claim in ("ii, softmax", "ii, Sinkhorn"):
        kind = claim.removeprefix("ii, ").lower()
        # Expert Choice has as many slots as Token Choice with a K times smaller capacity factor.
        every_k = {key: value for key, value in _base(f"{kind}_token_choice").items() if key != "top_k"}
        for token in study.find(router=f"{kind}_token_choice", **every_k):
            slots = _variant(token)["top_k"] * _variant(token)["capacity_factor"]
            for expert in study.find(router=f"{kind}_expert_choice"):
                if math.isclose(_variant(expert)["capacity_factor"], slots):
                    yield claim, _paired(expert, token, measure.of)
    for key, budget in _BUDGETS.items():
        for router in _SPARSE:
            sparse = study.one(router=router, capacity_factor=1.0, **_base(router))
            if soft and sparse:
                yield f"iii{key}", _at_budget(soft, sparse, budget, measure.of)
    for claim, router, option, (first, second) in (
        ("iv", "sinkhorn_token_choice", "combine", ("softmax", "plan")),
        ("v", "softmax_token_choice", "batch_priority", (True, False)),
    ):
        for group in study.find(router=router, **{option: first}):
            same = {key: _variant(group)[key] for key in ("capacity_factor", "top_k")}
            other = study.one(router=router, **same, **{option: second})
            if other:
                yield claim, _paired(group, other, measure.of)
    orders = _orders(study) if measure.name == "accuracy" else {}
    if orders:
        yield "vi", Pair("rank correlation of 10-shot and test accuracy", None, orders)


def _paired(first: Mapping[int, Run], second: Mapping[int, Run], value: Callable[[Run], float]) -> Pair:
    seeds = sorted(first.keys() & second.keys())
    return Pair(
        f"{_short(first)} - {_short(second)}",
        _variant(first)["router"],
        {seed: value(first[seed]) - value(second[seed]) for seed in seeds},
    )


def _at_budget(
    series: Sequence[Mapping[int, Run]], other: Mapping[int, Run], budget: _Budget, value: Callable[[Run], float]
) -> Pair:
    """Compares a router, interpolated over its capacity factors, with another model at that model's budget."""
    router = _variant(series[0])["router"]
    what = f"{style(router).short} - {_short(other)}"
    costs = [cost for group in series if (cost := budget.ratio(group, other)) is not None]
    if len(costs) < len(series):
        return Pair(what, router, {}, "no step was timed")
    points = sorted(zip(costs, series, strict=True), key=lambda point: point[0])
    lowest, highest = points[0][0], points[-1][0]
    if not lowest * (1 - TOLERANCE) <= 1 <= highest * (1 + TOLERANCE):
        times = f"{lowest:.2f} to {highest:.2f}" if len(points) > 1 else f"{lowest:.2f}"
        return Pair(what, router, {}, f"{budget.name} {times} times the other model's")
    above = next((place for place, (cost, _) in enumerate(points) if cost >= 1), len(points) - 1)
    (low, first), (high, second) = points[max(above - 1, 0)], points[above]
    share = 0.0 if low == high else -math.log(low) / (math.log(high) - math.log(low))
    share = min(max(share, 0.0), 1.0)
    seeds = sorted(first.keys() & second.keys() & other.keys())
    differences = {s: (1 - share) * value(first[s]) + share * value(second[s]) - value(other[s]) for s in seeds}
    return Pair(what, router, differences)


def _orders(study: _Study) -> dict[int, float]:
    """Computes the rank correlation of transfer and accuracy over the variants, for every seed of all variants."""
    found = {}
    for seed in sorted(set.intersection(*(set(group) for group in study.groups))) if study.groups else []:
        runs = [group[seed] for group in study.groups]
        if all(run["transfer"] for run in runs):
            order = _rank_correlation([(accuracy(run), run["transfer"]["accuracy"]) for run in runs])
            found |= {} if order is None else {seed: order}
    return found


def _order_of_means(runs: Sequence[Run]) -> float | None:
    """Computes the rank correlation of the means over the seeds that all variants have; None for fewer than two."""
    groups = _Study(runs).groups
    seeds = set.intersection(*map(set, groups)) if groups else set()
    if len(seeds) < 2 or not all(group[seed]["transfer"] for group in groups for seed in seeds):
        return None
    means = [
        (
            statistics.fmean(accuracy(group[seed]) for seed in seeds),
            statistics.fmean(group[seed]["transfer"]["accuracy"] for seed in seeds),
        )
        for group in groups
    ]
    return _rank_correlation(means)


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Computes Spearman's rank correlation; None for fewer than three pairs, or if all first or second values agree."""
    from scipy.stats import spearmanr  # takes a second to import, also in workers that never call this

    if len(pairs) < 3 or not all(len(set(values)) > 1 for values in zip(*pairs, strict=True)):
        return None
    correlation: Any = spearmanr([first for first, _ in pairs], [second for _, second in pairs])
    return float(correlation.statistic)


def _short(group: Mapping[int, Run]) -> str:
    variant = _variant(group)
    return short_label(variant["router"], variant["label"])
