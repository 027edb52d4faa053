"""Conditions under which the routers have the paper's order, computed from the records of the runs.

The paper's abstract (arXiv 2401.15969) says that Expert Choice generally outperforms Token Choice, and Soft MoE
generally outperforms sparse routers. A condition is a capacity factor of the comparison, or a value of an ablation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vmoe_routers.files import write_csv
from vmoe_routers.study.ablation_rows import ablation_groups
from vmoe_routers.study.ablations import ABLATIONS, TOGETHER
from vmoe_routers.study.styles import style
from vmoe_routers.study.summary import MEASURES, Run, Stat, by_variant, paired, stat
from vmoe_routers.study.variants import base_variant

ORDERS: tuple[tuple[str, str], ...] = (
    ("softmax_expert_choice", "softmax_token_choice"),
    ("sinkhorn_expert_choice", "sinkhorn_token_choice"),
    ("soft", "softmax_expert_choice"),
    ("soft", "softmax_token_choice"),
)
"""Pairs of routers. The paper's order has the first router of a pair ahead."""


@dataclass(frozen=True)
class Condition:
    """Differences of one measure between the routers of every pair of `ORDERS` under one condition.

    Attributes:
        measure: Key of `MEASURES`.
        title: The setting, for example "epochs".
        value: Its value.
        differences: Mean difference of a pair, taken seed by seed. A pair is missing if a router of it has
            no runs under the condition.
    """

    measure: str
    title: str
    value: str
    differences: Mapping[tuple[str, str], Stat]


def conditions(runs: Sequence[Run], measure: Literal["accuracy", "loss"] = "accuracy") -> list[Condition]:
    """Compares the routers of every pair at K = 1, softmax combine and no batch priority, under every condition.

    A router that is not among the routers of an ablation has the comparison's runs, unless the value changes a setting
    of all routers, for example the number of epochs. The ablations of `TOGETHER` also have conditions in which the
    routers have equal values.
    """
    by_name = {group[0]["variant"]["name"]: group for group in by_variant(runs)}
    factors = sorted({run["variant"]["capacity_factor"] or 1.0 for group in by_name.values() for run in group})
    routers = {router for pair in ORDERS for router in pair}

    def at_factor(router: str, factor: float) -> list[Run]:
        return by_name.get(replace(base_variant(router), capacity_factor=factor).name, [])

    found = [
        _condition(measure, "capacity factor", f"{factor:g}", {router: at_factor(router, factor) for router in routers})
        for factor in factors
    ]
    changed: dict[tuple[str, str], dict[str, list[Run]]] = {}
    equal: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for group in ablation_groups(runs):
        if not group.is_base and group.router is not None:
            for title in (title for title, names in TOGETHER.items() if group.ablation in names):
                equal.setdefault((title, group.arm.label), {})[group.router] = group.runs
            key, ablation = (group.ablation, group.arm.label), ABLATIONS[group.ablation]
            changes_all = group.arm.settings and not ablation.is_of_routers
            unchanged = set() if changes_all else routers - set(ablation.routers)
            shared = {router: at_factor(router, 1.0) for router in unchanged}
            changed.setdefault(key, shared)[group.router] = group.runs
    for (name, arm), of in changed.items():
        touched = set(ABLATIONS[name].routers)
        condition = _condition(measure, ABLATIONS[name].title, arm, of)
        kept = {pair: value for pair, value in condition.differences.items() if touched & set(pair)}
        found.append(replace(condition, differences=kept))
    found += [_condition(measure, title, arm, of) for (title, arm), of in equal.items()]
    return [condition for condition in found if condition.differences]


def _condition(measure: str, title: str, value: str, runs: Mapping[str, Sequence[Run]]) -> Condition:
    differences = {}
    for first, second in ORDERS:
        values = paired(runs.get(first, []), runs.get(second, []), MEASURES[measure].of)
        if values:
            differences[first, second] = stat(values)
    return Condition(measure, title, value, differences)


def order_title(pair: tuple[str, str]) -> str:
    """Returns the difference of a pair in words, for example "Softmax EC - Softmax TC"."""
    return " - ".join(style(router).short for router in pair)


def order_sentences(found: Sequence[Condition]) -> list[str]:
    """Counts for every pair the conditions with and against the paper's order, and names the clear ones.

    *Clear* means that the uncorrected 95 % interval excludes 0.
    """
    sentences = []
    for pair in ORDERS:
        of = [(condition, condition.differences[pair]) for condition in found if pair in condition.differences]
        if not of:
            continue
        sign = MEASURES[of[0][0].measure].sign
        ahead = [(condition, value) for condition, value in of if sign * value.mean > 0]
        behind = [(condition, value) for condition, value in of if sign * value.mean < 0]
        first, second = (style(router).title for router in pair)
        sentences.append(
            f"{first} is ahead of {second} in {len(ahead)} of {_count(len(of))}{_clear(ahead)}, and behind in "
            f"{len(behind)}{_clear(behind)}."
        )
    return sentences


def write_orders(found: Sequence[Condition], path: Path | str) -> None:
    """Writes one line per measure, condition and pair as CSV, in full precision. A missing value is empty."""
    columns = ["measure", "condition", "value", "first", "second", "seeds", "difference", "difference_error"]
    lines = [
        dict(zip(columns, (*of, *pair, value.count, value.mean, value.error), strict=True))
        for condition in found
        for of in [(condition.measure, condition.title, condition.value)]
        for pair, value in condition.differences.items()
    ]
    write_csv(Path(path), lines, columns)


def _count(number: int) -> str:
    return "1 condition" if number == 1 else f"{number} conditions"


def _clear(found: Sequence[tuple[Condition, Stat]]) -> str:
    clear = [f"{condition.title} {condition.value}" for condition, value in found if value.is_clear()]
    return f" (clearly in {len(clear)}: {'; '.join(clear)})" if clear else ""
