"""Rows of the ablations, computed from the records of the runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmoe_routers.study.ablations import ABLATIONS, Arm
from vmoe_routers.study.styles import style
from vmoe_routers.study.summary import Run, Stat, accuracy, by_variant, loss, paired, stat
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
        accuracy, loss: On the final images.
        difference, loss_difference: Differences of accuracy and loss to the comparison's runs, taken seed by seed; None
            for a row of the comparison's runs.
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


def ablation_rows(runs: Sequence[Run]) -> list[AblationRow]:
    """Makes one row per ablation, router and value that was run.

    The row of a value that changes nothing has the comparison's runs, with the seeds of the ablation's other runs.
    """
    base = {group[0]["variant"]["name"]: group for group in by_variant(runs)}
    found: dict[tuple[str, str | None, str], list[Run]] = {}
    for run in runs:
        variant = run["variant"]
        if variant["ablation"] is not None:
            found.setdefault((variant["ablation"], variant["router"], variant["arm"]), []).append(run)
    rows = []
    for name, ablation in ABLATIONS.items():
        for router in ablation.routers:
            key = None if router == "dense" else router
            seeds = {run["seed"] for arm in ablation.arms for run in found.get((name, key, arm.label), [])}
            of_base = [run for run in base.get(base_variant(router).name, []) if run["seed"] in seeds]
            for arm in ablation.arms:
                of = found.get((name, key, arm.label), [])
                is_base = not of and bool(of_base) and _changes_nothing(arm, of_base[0])
                if of or is_base:
                    rows.append(_row(name, arm.label, key, of or of_base, of_base, is_base=is_base))
    return rows


def _changes_nothing(arm: Arm, run: Run) -> bool:
    same = all(run["settings"].get(key) == value for key, value in arm.settings.items())
    return same and not arm.options and arm.factor == 1


def _row(
    ablation: str, arm: str, router: str | None, runs: Sequence[Run], base: Sequence[Run], *, is_base: bool
) -> AblationRow:
    def difference(value: Callable[[Run], float]) -> Stat | None:
        values = paired(runs, base, value)
        return stat(values) if values and not is_base else None

    dropped = [layer["dropped"] for run in runs for layer in run["layers"]]
    return AblationRow(
        ablation=ablation,
        arm=arm,
        router=router,
        label=style(router).title,
        is_base=is_base,
        seeds=len(runs),
        accuracy=stat(map(accuracy, runs)),
        loss=stat(map(loss, runs)),
        difference=difference(accuracy),
        loss_difference=difference(loss),
        dropped=stat(dropped).mean if dropped else None,
    )
