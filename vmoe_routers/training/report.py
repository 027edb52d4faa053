"""Tables and files of evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vmoe_routers.files import write_whole
from vmoe_routers.training.evaluation import Evaluation

_LOWEST = 3  # number of classes in the line on the lowest accuracy
_LAYERS = {"utilisation": "slots used", "dropped": "dropped", "load_cv": "load cv", "entropy": "entropy"}
_LAYERS |= {"dead_experts": "dead experts"}


def make_table(*columns: str) -> Table:
    """Makes an empty table with a column of names and columns of numbers."""
    table = Table(box=None, header_style="", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def print_evaluation(found: Evaluation, classes: Sequence[str], console: Console) -> None:
    """Prints the means, the metrics of the MoE layers, and the classes with the lowest accuracy."""
    table = make_table("top-1", "top-5", "loss", "calibration error", "images/s")
    table.columns[0].justify = "right"
    means = (found.top1, found.top5, found.loss, found.calibration_error)
    table.add_row(*(f"{value:.4f}" for value in means), f"{found.images_per_second:.0f}")
    console.print(table)
    if found.layers:
        table = make_table("MoE layer", *_LAYERS.values())
        for name, metrics in found.layers.items():
            *shares, dead = (metrics[key] for key in _LAYERS)
            table.add_row(name, *(f"{value:.3f}" for value in shares), str(dead))
        console.print(table)
    seen = [(row["top1"], name) for row, name in zip(found.classes, classes, strict=True) if row["images"]]
    lowest = ", ".join(f"{name} {top1:.3f}" for top1, name in sorted(seen)[:_LOWEST])
    console.print(f"lowest top-1: {lowest}", soft_wrap=True)


def class_rows(found: Evaluation, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Makes the rows of the table of classes, with the names of the classes."""
    return [{"class": name, **row} for name, row in zip(classes, found.classes, strict=True)]


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes values to a file. Creates its folder if missing.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=1, default=str) + "\n"
    write_whole(path, lambda partial: partial.write_text(text))
