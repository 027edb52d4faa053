"""The table of the study: one row per variant, from the records of its runs.

A run's record, one for each variant and seed, is a dict as JSON holds it:

    variant        name, label, router (None: the dense ViT), top_k, combine, capacity_factor; None where it has none
    seed
    epochs         list of epoch, seconds (of training so far), train_loss; accuracy (0..1) and loss on validation
    train_seconds, step_ms (median)
    cost           slots (per image and MoE layer; dense: tokens), mlp_flops, flops (forward, per image), parameters
    layers         list of block, load (tokens per image of each expert), utilisation, load_cv, dropped, entropy,
                   dead_experts; empty for the dense ViT
    transfer       data, accuracy; or None

Means are over seeds, with the standard error of the mean (sample deviation, ddof = 1);
differences to the dense ViT are taken seed by seed first, since runs of one seed share trunk
initialisation, data order and augmentation.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmoe_routers.routers import ROUTERS

Run = Mapping[str, Any]


class Stat(NamedTuple):
    """A mean and its standard error; the error of a single value is None."""

    mean: float
    error: float | None


@dataclasses.dataclass(frozen=True)
class Row:
    """What the runs of one variant say; accuracies are in 0..1, None is "not there".

    The differences and `step_ratio` (median over seeds) use the seeds that the dense ViT has
    too. Of the routing figures, `dead_experts` is summed over the MoE layers and the others
    are means over layers; all are means over seeds.
    """

    name: str
    label: str
    router: str | None
    top_k: int | None
    combine: str | None
    capacity_factor: float | None
    seeds: int
    accuracy: Stat
    loss: Stat
    accuracy_difference: Stat | None
    loss_difference: Stat | None
    train_seconds: Stat
    step_ms: float
    step_ratio: float | None
    slots: float
    mlp_flops: float
    mlp_flops_ratio: float | None
    flops: float
    flops_ratio: float | None
    parameters: float
    dropped: float | None
    load_cv: float | None
    utilisation: float | None
    dead_experts: float | None
    transfer: Stat | None


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """Routing in one MoE layer of a variant, means over seeds.

    `load` is sorted from the most to the least loaded expert before the mean is taken: experts
    of different seeds have nothing in common but their rank.
    """

    name: str
    label: str
    router: str
    block: int
    load: list[float]
    utilisation: float | None
    load_cv: float | None
    dropped: float | None
    entropy: float | None
    dead_experts: float | None


def stat(values: Iterable[float]) -> Stat:
    """The mean of at least one value, with its standard error."""
    values = [float(value) for value in values]
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Stat(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Stat(mean, math.sqrt(variance / count))


def accuracy(run: Run) -> float:
    """Validation accuracy after the last epoch, in 0..1."""
    return run["epochs"][-1]["accuracy"]


def loss(run: Run) -> float:
    """Validation loss after the last epoch."""
    return run["epochs"][-1]["loss"]


def paired(
    runs: Sequence[Run],
    others: Sequence[Run],
    value: Callable[[Run], float],
    how: Callable[[float, float], float] = lambda a, b: a - b,
) -> list[float]:
    """`how(value of run, value of other)`, by default the difference, for every seed that both have."""
    by_seed = {run["seed"]: run for run in others}
    return [how(value(run), value(by_seed[run["seed"]])) for run in runs if run["seed"] in by_seed]


def by_variant(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs grouped by variant and sorted by seed, in an order that the order of `runs` does not change.

    The dense ViT first, then the routers in the order of `ROUTERS`, then by K, combine
    (softmax before plan) and capacity factor.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        seeds = groups.setdefault(run["variant"]["name"], {})
        if run["seed"] in seeds:
            raise ValueError(f"by_variant: two runs of variant {run['variant']['name']!r} with seed {run['seed']}")
        seeds[run["seed"]] = run
    ordered = sorted(groups.values(), key=lambda seeds: _order(next(iter(seeds.values()))["variant"]))
    return [[seeds[seed] for seed in sorted(seeds)] for seeds in ordered]


def _order(variant: Mapping[str, Any]) -> tuple:
    router = variant["router"]
    place = -1 if router is None else ROUTERS.index(router) if router in ROUTERS else len(ROUTERS)
    combine = variant["combine"]
    capacity = variant["capacity_factor"]
    return place, router or "", variant["top_k"] or 0, combine == "plan", capacity or 0.0, variant["name"]


def _mean(values: Iterable[float | None]) -> float | None:
    there = [float(value) for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def _layer_values(runs: Sequence[Run], key: str) -> list[float | None]:
    return [layer[key] for run in runs for layer in run["layers"]]


def summarise(runs: Iterable[Run]) -> list[Row]:
    """One row per variant, in the order of `by_variant`."""
    groups = by_variant(runs)
    dense = next((group for group in groups if group[0]["variant"]["router"] is None), [])
    return [_row(group, dense) for group in groups]


def _row(runs: Sequence[Run], dense: Sequence[Run]) -> Row:
    def cost(key: str, of: Sequence[Run] = runs) -> float:
        return stat(run["cost"][key] for run in of).mean

    def difference(value: Callable[[Run], float]) -> Stat | None:
        values = paired(runs, dense, value)
        return stat(values) if values and runs is not dense else None

    steps = paired(runs, dense, lambda run: run["step_ms"], lambda a, b: a / b)
    dead = [sum(layer["dead_experts"] for layer in run["layers"]) for run in runs if run["layers"]]
    transfers = [run["transfer"]["accuracy"] for run in runs if run["transfer"]]
    variant = runs[0]["variant"]
    return Row(
        **{key: variant[key] for key in ("name", "label", "router", "top_k", "combine", "capacity_factor")},
        seeds=len(runs),
        accuracy=stat(map(accuracy, runs)),
        loss=stat(map(loss, runs)),
        accuracy_difference=difference(accuracy),
        loss_difference=difference(loss),
        train_seconds=stat(run["train_seconds"] for run in runs),
        step_ms=statistics.median(run["step_ms"] for run in runs),
        step_ratio=statistics.median(steps) if steps else None,
        slots=cost("slots"),
        mlp_flops=cost("mlp_flops"),
        mlp_flops_ratio=cost("mlp_flops") / cost("mlp_flops", dense) if dense else None,
        flops=cost("flops"),
        flops_ratio=cost("flops") / cost("flops", dense) if dense else None,
        parameters=cost("parameters"),
        dropped=_mean(_layer_values(runs, "dropped")),
        load_cv=_mean(_layer_values(runs, "load_cv")),
        utilisation=_mean(_layer_values(runs, "utilisation")),
        dead_experts=_mean(dead),
        transfer=stat(transfers) if transfers else None,
    )


def summarise_layers(runs: Iterable[Run]) -> list[LayerRow]:
    """One row per variant and MoE layer; the dense ViT has none."""
    rows = []
    for group in by_variant(runs):
        variant = group[0]["variant"]
        for layers in zip(*(run["layers"] for run in group), strict=True):
            loads = zip(*(sorted(layer["load"], reverse=True) for layer in layers), strict=True)
            rows.append(
                LayerRow(
                    name=variant["name"],
                    label=variant["label"],
                    router=variant["router"],
                    block=layers[0]["block"],
                    load=[stat(load).mean for load in loads],
                    **{
                        key: _mean(layer[key] for layer in layers)
                        for key in ("utilisation", "load_cv", "dropped", "entropy", "dead_experts")
                    },
                )
            )
    return rows


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of the table: `key` is the field of `Row`, `scale` turns it into `unit`."""

    key: str
    group: str
    title: str
    unit: str
    format: str
    scale: float = 1.0
    has_error: bool = False
    in_terminal: bool = True

    def text(self, row: Row) -> str:
        """The cell in words: "97.2±0.1"; "±-" where one seed gives no error, "-" where there is nothing."""
        value = getattr(row, self.key)
        if value is None:
            return "-"
        if not self.has_error:
            return format(value * self.scale, self.format)
        error = "-" if value.error is None else format(value.error * self.scale, self.format.lstrip("+"))
        return f"{format(value.mean * self.scale, self.format)}±{error}"


COLUMNS: tuple[Column, ...] = (
    Column("seeds", "", "seeds", "", ".0f", in_terminal=False),
    Column("accuracy", "validation", "accuracy", "%", ".1f", 100, has_error=True),
    Column("loss", "validation", "loss", "nats", ".3f", has_error=True),
    Column("accuracy_difference", "minus dense", "Δ acc.", "points", "+.1f", 100, has_error=True),
    Column("loss_difference", "minus dense", "Δ loss", "nats", "+.3f", has_error=True),
    Column("transfer", "transfer", "10-shot", "%", ".1f", 100, has_error=True),
    Column("train_seconds", "cost", "training", "s", ".0f", has_error=True, in_terminal=False),
    Column("step_ms", "cost", "step", "ms", ".1f", in_terminal=False),
    Column("step_ratio", "cost", "step", "×dense", ".2f"),
    Column("slots", "cost", "slots", "/image", ".1f"),
    Column("mlp_flops_ratio", "cost", "MLP FLOPs", "×dense", ".2f"),
    Column("mlp_flops", "cost", "MLP FLOPs", "M", ".2f", 1e-6, in_terminal=False),
    Column("flops_ratio", "cost", "FLOPs", "×dense", ".2f", in_terminal=False),
    Column("flops", "cost", "FLOPs", "M", ".2f", 1e-6, in_terminal=False),
    Column("parameters", "cost", "weights", "M", ".2f", 1e-6, in_terminal=False),
    Column("dropped", "routing", "dropped", "%", ".1f", 100),
    Column("load_cv", "routing", "load", "CV", ".2f"),
    Column("utilisation", "routing", "used", "%", ".0f", 100, in_terminal=False),
    Column("dead_experts", "routing", "dead", "experts", ".1f", in_terminal=False),
)

_VARIANT = ("name", "label", "router", "top_k", "combine", "capacity_factor")


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """The columns that say something: seeds where they differ, the others where at least one row has them."""
    found = [column for column in COLUMNS if any(getattr(row, column.key) is not None for row in rows)]
    return [column for column in found if column.key != "seeds" or len({row.seeds for row in rows}) > 1]


_LABEL_WIDTH = 21  # of the terminal's table at least; longer labels go over several lines


def write_csv(rows: Sequence[Row], path: Path | str) -> None:
    """The table in full precision and base units (accuracy in 0..1, FLOPs); nothing there is an empty cell."""
    header = [*_VARIANT]
    for column in COLUMNS:
        header += [column.key, f"{column.key}_error"] if column.has_error else [column.key]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for row in rows:
            cells = [getattr(row, key) for key in _VARIANT]
            for column in COLUMNS:
                value = getattr(row, column.key)
                cells += (value or (None, None)) if column.has_error else (value,)
            writer.writerow(cells)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """The columns marked `in_terminal`, in at most 120 characters; in a narrower terminal, those that fit.

    The report and the CSV have them all.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.caption = Text("Δ: minus dense, seed by seed; ±: standard error of the mean over seeds", style="dim")
    table.caption_justify = "left"
    table.add_column(Text("variant"))
    cells: list[list[str]] = []
    room = console.width - _LABEL_WIDTH
    for column in (column for column in shown_columns(rows) if column.in_terminal):
        texts = [column.text(row) for row in rows]
        room -= 2 + max(map(len, (column.title, column.unit, *texts)))
        if room < 0:
            break
        table.add_column(Text(f"{column.title}\n{column.unit}"), justify="right", no_wrap=True)
        cells.append(texts)
    for row, *texts in zip(rows, *cells, strict=True):
        table.add_row(Text(row.label), *map(Text, texts))
    console.print(table)
