"""Rows of the ablations, computed from the records of the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmoe_routers.study.ablations import ABLATIONS, Arm
from vmoe_routers.study.styles import style
from vmoe_routers.study.summary import Run, Stat, accuracy, by_variant, layer_mean, loss, paired, stat
from vmoe_routers.study.variants import base_variant


@dataclass(frozen=True)
class AblationRow:
    """Runs of one router with one value of an ablation, as means over seeds. Accuracies are in [0, 1].

    Attributes:
        ablation, arm: Names of the ablation and of its value.
        router: The router's name; None: the dense ViT.
        label: The router's title.
        is_base: Whether the runs are runs of the comparison.
        seeds: Number of seeds.
        accuracy, loss: The final values.
        difference, loss_difference: Differences of accuracy and loss to the comparison's runs or to the runs of the
            ablation's reference, taken seed by seed; None for a row of these runs, or without a
            common seed.
        dropped: Mean share of dropped tokens over seeds and layers; None for the dense ViT.
    """

    ablation: str
    arm: str
    router: str | None
    label: str
    is_base: bool
    seeds: int
    accuracy: Stat
    loss: Stat
    difference: Stat | None
    loss_difference: Stat | None
    dropped: float | None


@dataclass(frozen=True)
class Group:
    """Runs of one router with one value of an ablation.

    Attributes:
        ablation: Name of the ablation.
        arm: Value of the ablation.
        router: The router's name; None: the dense ViT.
        runs: The runs.
        base: The runs with which `runs` are compared: the comparison's runs of the same router, with the seeds of the
            ablation, or the runs of the ablation's reference.
        is_base: Whether `runs` are the comparison's runs.
    """

    ablation: str
    arm: Arm
    router: str | None
    runs: list[Run]
    base: list[Run]
    is_base: bool


def ablation_groups(runs: Sequence[Run]) -> list[Group]:
    """Groups the runs by ablation, router and value.

    The group of a value that changes nothing has the comparison's runs, with the seeds of the ablation's other runs.
    """
    base = {group[0]["variant"]["name"]: group for group in by_variant(runs)}
    found: dict[tuple[str, str | None, str], list[Run]] = {}
    for run in runs:
        variant = run["variant"]
        if variant["ablation"] is not None:
            found.setdefault((variant["ablation"], variant["router"], variant["arm"]), []).append(run)
    groups = []
    for name, ablation in ABLATIONS.items():
        for router in ablation.routers:
            key = None if router == "dense" else router
            seeds = {run["seed"] for arm in ablation.arms for run in found.get((name, key, arm.label), [])}
            of_base = [run for run in base.get(base_variant(router).name, []) if run["seed"] in seeds]
            reference = of_base if ablation.reference is None else found.get((name, key, ablation.reference), [])
            for arm in ablation.arms:
                of = found.get((name, key, arm.label), [])
                is_base = not of and bool(of_base) and _changes_nothing(arm, of_base[0])
                if of or is_base:
                    groups.append(Group(name, arm, key, of or of_base, reference, is_base))
    return groups


def ablation_rows(runs: Sequence[Run]) -> list[AblationRow]:
    """Makes one row per ablation, router and value that was run."""
    return [_row(group) for group in ablation_groups(runs)]


def _changes_nothing(arm: Arm, run: Run) -> bool:
    same = all(run["settings"].get(key) == value for key, value in arm.settings.items())
    return same and not arm.options and arm.factor == 1


def _row(group: Group) -> AblationRow:
    def difference(value: Callable[[Run], float]) -> Stat | None:
        values = paired(group.runs, group.base, value)
        return stat(values) if values and group.runs is not group.base else None

    return AblationRow(
        ablation=group.ablation,
        arm=group.arm.label,
        router=group.router,
        label=style(group.router).title,
        is_base=group.is_base,
        seeds=len(group.runs),
        accuracy=stat(map(accuracy, group.runs)),
        loss=stat(map(loss, group.runs)),
        difference=difference(accuracy),
        loss_difference=difference(loss),
        dropped=layer_mean(group.runs, "dropped"),
    )
