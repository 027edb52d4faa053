"""Figures of the study, from the records of its runs.

Every figure has a function `<figure>_data`, which returns the numbers as a list of dicts, and a function that draws
exactly these numbers. Figures are `matplotlib.figure.Figure` objects. No function uses pyplot or a display.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from vmoe_routers.files import write_csv, write_whole
from vmoe_routers.study import plots
from vmoe_routers.study.ablation_rows import ablation_rows
from vmoe_routers.study.claims import decide
from vmoe_routers.study.plots import Data
from vmoe_routers.study.summary import VARIANT_KEYS, Run, by_variant, stat, summarise, summarise_layers


@dataclasses.dataclass(frozen=True)
class Drawing:
    """Figure of the study.

    Attributes:
        name: The stem of its files.
        title, caption: Texts of the report.
        figure: The drawn figure.
        data: The drawn numbers.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    data: Data


def draw(runs: Sequence[Run]) -> list[Drawing]:
    """Draws every figure for which the runs have numbers, in the order of the report."""
    found = []
    for name, title, caption, collect, paint in _FIGURES:
        data = collect(runs)
        if data:
            found.append(Drawing(name, title, caption, paint(data), data))
    return found


def save(folder: Path | str, name: str, figure: Figure, data: Data) -> Path:
    """Writes `name.png`, `name.svg` and the drawn numbers as `name.csv` to `folder`. Returns the path of the PNG."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", data)
    path = folder / f"{name}.png"
    write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=150))
    # A fixed salt and no date make the file depend on the numbers only.
    with rc_context({"svg.hashsalt": name}):
        write_whole(
            folder / f"{name}.svg", lambda partial: figure.savefig(partial, format="svg", metadata={"Date": None})
        )
    return path


def save_all(folder: Path | str, runs: Sequence[Run]) -> list[Path]:
    """Draws and saves every figure for which the runs have numbers. Returns the paths of the pictures."""
    return [save(folder, drawing.name, drawing.figure, drawing.data) for drawing in draw(runs)]


def figure_1(runs: Sequence[Run]) -> Figure | None:
    """Draws training time and FLOPs against final accuracy and loss. Returns None without runs."""
    return _paint(figure_1_data(runs), plots.paint_figure_1)


def figure_2(runs: Sequence[Run]) -> Figure | None:
    """Draws training time against 10-shot transfer accuracy. Returns None if no run measured the transfer."""
    return _paint(figure_2_data(runs), plots.paint_figure_2)


def figure_3(runs: Sequence[Run]) -> Figure | None:
    """Draws the epochs of Sinkhorn Token Choice, softmax against plan combine. Returns None without such runs."""
    return _paint(figure_3_data(runs), plots.paint_figure_3)


def figure_load(runs: Sequence[Run]) -> Figure | None:
    """Draws the load of the experts in every MoE layer, sorted in descending order. Returns None without MoE layers."""
    return _paint(figure_load_data(runs), plots.paint_figure_load)


def _paint(data: Data, paint: Callable[[Data], Figure]) -> Figure | None:
    return paint(data) if data else None


def figure_1_data(runs: Iterable[Run]) -> Data:
    """One dict per variant: training time in seconds, FLOPs, accuracy in [0, 1] and loss, with standard errors."""
    return [
        _point(
            row,
            train_seconds=row.train_seconds or (None, None),
            flops=row.flops,
            accuracy=row.accuracy,
            loss=row.loss,
        )
        for row in summarise(runs)
    ]


def forest_data(runs: Iterable[Run]) -> Data:
    """One dict per measure and comparison of a claim that has two seeds or more."""
    runs = list(runs)
    found = [*decide(runs), *decide(runs, "loss")]
    return [dataclasses.asdict(comparison) for comparison in found if comparison.low is not None]


def ablation_data(runs: Iterable[Run]) -> Data:
    """One dict per ablation, router and value: accuracy in [0, 1], loss and differences, with standard errors."""
    data = []
    for row in ablation_rows(list(runs)):
        point: dict[str, Any] = {}
        for key, value in vars(row).items():
            if isinstance(value, tuple):
                point |= {key: value[0], f"{key}_error": value[1]}
            else:
                point[key] = value
                if value is None and key.endswith("difference"):
                    point[f"{key}_error"] = None
        data.append(point)
    return data


def figure_2_data(runs: Iterable[Run]) -> Data:
    """One dict per variant that measured the transfer: training time in seconds, FLOPs and accuracy."""
    runs = [run for run in runs if run["transfer"]]
    names = {run["variant"]["name"]: run["transfer"]["data"] for run in runs}
    return [
        _point(
            row,
            data=names[row.name],
            train_seconds=row.train_seconds or (None, None),
            flops=row.flops,
            transfer_accuracy=row.transfer,
        )
        for row in summarise(runs)
    ]


def _point(row: Any, **values: Any) -> dict[str, Any]:
    point = {key: getattr(row, key) for key in (*VARIANT_KEYS, "seeds")}
    for key, value in values.items():
        if isinstance(value, tuple):
            point |= {key: value[0], f"{key}_error": value[1]}
        else:
            point[key] = value
    return point


def figure_3_data(runs: Iterable[Run]) -> Data:
    """One dict per epoch and variant that has a `combine`: accuracy in [0, 1] and loss, with standard errors.

    A single epoch is no curve, so such variants are left out.
    """
    data = []
    for group in by_variant(runs):
        variant = group[0]["variant"]
        if variant["combine"] is None or max(len(run["epochs"]) for run in group) < 2:
            continue
        # The curve ends with the shortest run: a mean over fewer seeds would show as a step.
        for epochs in zip(*(run["epochs"] for run in group), strict=False):
            keys = ("name", "label", "top_k", "combine", "capacity_factor")
            point = {key: variant[key] for key in keys} | {"seeds": len(group), "epoch": epochs[0]["epoch"]}
            for key in ("accuracy", "loss"):
                found = stat(epoch[key] for epoch in epochs)
                point |= {key: found.mean, f"{key}_error": found.error}
            data.append(point)
    return data


def figure_load_data(runs: Iterable[Run]) -> Data:
    """One dict per variant, MoE layer and rank: mean tokens per image, also divided by the even share.

    A study with variants of capacity factor 1 shows only these, so that the panels fit on a page.
    """
    runs = list(runs)
    usual = [run for run in runs if run["variant"]["capacity_factor"] == 1]
    data = []
    for row in summarise_layers(usual or runs):
        layer = {"name": row.name, "label": row.label, "router": row.router, "block": row.block}
        even = math.fsum(row.load) / len(row.load)
        for rank, load in enumerate(row.load, start=1):
            data.append(layer | {"rank": rank, "load": load, "relative_load": load / even if even else 0.0})
    return data


_FIGURES: tuple[tuple[str, str, str, Callable[[Sequence[Run]], Data], Callable[[Data], Figure]], ...] = (
    (
        "figure_1",
        "Figure 1. Training time and FLOPs against accuracy and loss",
        "One point per variant: the mean over seeds after the last epoch. Bars are standard errors. Training time is "
        "the number of steps times the median step, which was timed with all variants in turns. Shape and colour show "
        "the router, and the size shows the capacity factor. A white inside means K = 1, a dot means plan-valued "
        "combine, and a cross means batch priority. Points further left are cheaper. Higher accuracy and lower loss "
        "are better. No variant is both cheaper and better than a variant on the dashed line (the Pareto front).",
        figure_1_data,
        plots.paint_figure_1,
    ),
    (
        "figure_2",
        "Figure 2. Training time against 10-shot transfer accuracy",
        "Ridge regression on frozen features, with ten images per class of a second data set. Marks as in Figure 1.",
        figure_2_data,
        plots.paint_figure_2,
    ),
    (
        "forest",
        "Comparisons of the claims",
        "Mean differences in accuracy and in loss, seed by seed, with their 95 % intervals by Student's t, before "
        "Holm's correction. A filled mark is clear after the correction. The axis of the loss is reversed, so that a "
        "mark on the right of 0 supports the claim by both measures. Claim vi has rank correlations.",
        forest_data,
        plots.paint_forest,
    ),
    (
        "figure_3",
        "Figure 3. Sinkhorn Token Choice: softmax against plan-valued combine",
        "Mean over seeds with a band of one standard error. The frame may cut off the first quarter of the epochs.",
        figure_3_data,
        plots.paint_figure_3,
    ),
    (
        "figure_load",
        "Load of the experts",
        "Tokens that each expert took on the images of the final accuracy, divided by the even share (dotted line). "
        "Experts are sorted by load in every seed before the mean over seeds is taken. Every MoE layer has a line, "
        "later blocks darker ones. Only variants of capacity factor 1 are shown, if there are any.",
        figure_load_data,
        plots.paint_figure_load,
    ),
    (
        "ablations",
        "Ablations",
        "Mean accuracy over seeds, with standard errors. Each panel changes one setting, at capacity factor 1 and "
        "K = 1, or at equal slots (images per group, experts of Soft MoE). A white mark is the value of the "
        "comparison.",
        ablation_data,
        plots.paint_ablations,
    ),
)
