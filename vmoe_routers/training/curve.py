"""Picture of a training: loss and accuracy over steps."""

from __future__ import annotations

from pathlib import Path

from vmoe_routers.files import write_whole
from vmoe_routers.training.log import EVALUATIONS, LOG, read_table


def draw_curve(folder: Path) -> Path:
    """Draws the training's loss, the test loss and the test accuracy from its tables. Returns the picture's path."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    log, evaluations = read_table(folder / LOG), read_table(folder / EVALUATIONS)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, accuracy = figure.subplots(1, 2)
    dot = "o" if len(log) < 30 else ""  # a line through one point is invisible
    losses.plot(*_column(log, "loss"), color="0.6", linewidth=1, marker=dot, markersize=3, label="training")
    losses.plot(*_column(evaluations, "loss"), marker="o", markersize=3, label="test")
    losses.set(xlabel="step", ylabel="loss", title="Loss")
    losses.legend(frameon=False)
    steps, values = _column(evaluations, "top1")
    accuracy.plot(steps, values, marker="o", markersize=3)
    accuracy.annotate(f"{values[-1]:.4f}", (steps[-1], values[-1]), (-4, -14), textcoords="offset points", ha="right")
    accuracy.set(xlabel="step", ylabel="accuracy", title="Accuracy on the test images")
    for axes in (losses, accuracy):
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = folder / "curve.png"
    write_whole(path, lambda partial: figure.savefig(partial, dpi=150, format="png"))
    return path


def _column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]
