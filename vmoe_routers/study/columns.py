"""Columns of the study's table. Writes the table as CSV and prints the table. `tables` makes the HTML table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmoe_routers import files
from vmoe_routers.study.styles import short_label
from vmoe_routers.study.summary import VARIANT_KEYS, Row


@dataclasses.dataclass(frozen=True)
class Column:
    """Column of the table.

    Attributes:
        key: The field of `Row`.
        group: The heading above the titles of neighbouring columns.
        title, unit: The column's own heading.
        format: The format of the scaled value.
        scale: The factor from the field to the unit.
        has_error: Whether the field is a `Stat`, a value with a standard error.
        in_terminal: Whether the terminal shows the column.
    """

    key: str
    group: str
    title: str
    unit: str
    format: str
    scale: float = 1.0
    has_error: bool = False
    in_terminal: bool = True

    def text(self, row: Row) -> str:
        """Formats the cell, as "97.2±0.1"; "±-" if one seed gives no standard error, "-" if the value is missing."""
        value = getattr(row, self.key)
        if value is None:
            return "-"
        if not self.has_error:
            return format(value * self.scale, self.format)
        return value.text(self.format, self.scale) + ("±-" if value.error is None else "")


COLUMNS: tuple[Column, ...] = (
    Column("seeds", "", "seeds", "", ".0f", in_terminal=False),
    Column("accuracy", "final", "accuracy", "%", ".1f", 100, has_error=True),
    Column("loss", "final", "loss", "nats", ".3f", has_error=True),
    Column("accuracy_difference", "minus dense", "Δ acc.", "points", "+.1f", 100, has_error=True),
    Column("loss_difference", "minus dense", "Δ loss", "nats", "+.3f", has_error=True),
    Column("transfer", "transfer", "10-shot", "%", ".1f", 100, has_error=True),
    Column("train_seconds", "cost", "training", "s", ".0f", has_error=True, in_terminal=False),
    Column("step_ms", "cost", "step", "ms", ".1f", has_error=True, in_terminal=False),
    Column("step_ratio", "cost", "step", "×dense", ".2f", has_error=True),
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


def shown_columns(rows: Sequence[Row]) -> list[Column]:
    """Returns the columns with a value in at least one row. Seeds are shown only if their number differs."""
    found = [column for column in COLUMNS if any(getattr(row, column.key) is not None for row in rows)]
    return [column for column in found if column.key != "seeds" or len({row.seeds for row in rows}) > 1]


_LABEL_WIDTH = 22  # characters kept for the labels in the terminal; longer labels are wrapped


def write_csv(rows: Sequence[Row], path: Path | str) -> None:
    """Writes the table in full precision and base units (accuracy in [0, 1], FLOPs). A missing value is empty."""
    columns = [*VARIANT_KEYS]
    for column in COLUMNS:
        columns += [column.key, f"{column.key}_error"] if column.has_error else [column.key]
    table = []
    for row in rows:
        cells = {key: getattr(row, key) for key in VARIANT_KEYS}
        for column in COLUMNS:
            value = getattr(row, column.key)
            if column.has_error:
                cells[column.key], cells[f"{column.key}_error"] = value[:2] if value else (None, None)
            else:
                cells[column.key] = value
        table.append(cells)
    files.write_csv(Path(path), table, columns)


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Prints the columns marked `in_terminal`, as many as fit into the terminal. All fit into 120 characters.

    The report and the CSV file have all columns.
    """
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.caption = Text(
        "Δ: minus dense, seed by seed; ±: standard error over seeds; for step, over rounds", style="dim"
    )
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
        table.add_row(Text(short_label(row.router, row.label)), *map(Text, texts))
    console.print(table)
