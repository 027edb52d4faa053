"""Compares two studies: a new router with kept records, or one study on two machines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vmoe_routers.study.folders import read_contents, read_runs
from vmoe_routers.study.records import RecordError
from vmoe_routers.study.styles import short_label
from vmoe_routers.study.summary import Run, Stat, accuracy, by_variant, paired, stat

_OF_RUN = ("learning_rate", "options", "device")  # settings that may differ between two runs that are compared


class StudiesDiffer(ValueError):
    """Two studies that cannot be compared. The message names the difference."""


def compare_studies(first: Path, second: Path, console: Console | None = None) -> None:
    """Prints the final accuracies of two studies side by side.

    Runs of the same variant and seed start from the same trunk and see the same batches, so their difference is taken
    seed by seed.

    Args:
        first, second: The folders of the studies.
        console: Where to print.

    Raises:
        StudiesDiffer: The images or the settings of the trainings differ.
        RecordError: A folder holds no study, a study of another version, or a damaged record.
        OSError: A file cannot be read.
    """
    console = console or Console(markup=False, emoji=False)
    contents = [read_contents(folder) for folder in (first, second)]
    runs = [read_runs(folder, of) for folder, of in zip((first, second), contents, strict=True)]
    for folder, found in zip((first, second), runs, strict=True):
        if not found:
            raise RecordError(f"{folder}: holds no finished run")
    _check(contents, runs)
    for line in _notes(runs):
        console.print(line, highlight=False, soft_wrap=True)
    groups = [{of[0]["variant"]["name"]: of for of in by_variant(found)} for found in runs]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.caption = Text(
        f"A: {first}\nB: {second}\nAccuracy in %, ±: standard error over seeds; bold: 95 % interval without 0",
        style="dim",
    )
    table.caption_justify = "left"
    table.add_column(Text("variant"))
    for title in ("A", "B", "B - A", "A - dense", "B - dense"):
        table.add_column(Text(title), justify="right", no_wrap=True)
    for name in dict.fromkeys([*groups[0], *groups[1]]):
        a, b = (of.get(name, []) for of in groups)
        variant = (a or b)[0]["variant"]
        dense = [_difference(of, group.get("dense", [])) for of, group in zip((a, b), groups, strict=True)]
        cells = [_cell(_mean(a)), _cell(_mean(b)), _cell(_difference(b, a), "+.2f")]
        cells += [Text("") if name == "dense" else _cell(value, "+.2f") for value in dense]
        table.add_row(Text(short_label(variant["router"], variant["label"])), *cells)
    console.print(table)


def _check(contents: Sequence[Mapping[str, Any]], runs: Sequence[Sequence[Run]]) -> None:
    """Refuses studies of different images or trainings."""
    if contents[0].get("images") != contents[1].get("images"):
        names = [of.get("data") for of in contents]
        raise StudiesDiffer(
            f"the studies have different images: {names[0]!r} and {names[1]!r}"
            if names[0] != names[1]
            else f"the studies have different images, both named {names[0]!r}"
        )
    settings = [
        {key: value for key, value in found[0]["settings"].items() if key not in _OF_RUN}
        for found in ([run for run in of if run["variant"]["ablation"] is None] or of for of in runs)
    ]
    keys = sorted(settings[0].keys() | settings[1].keys())
    different = [key for key in keys if settings[0].get(key) != settings[1].get(key)]
    if different:
        words = "; ".join(f"{key} {settings[0].get(key)} and {settings[1].get(key)}" for key in different)
        raise StudiesDiffer(f"the studies cannot be compared, their settings differ: {words}")


def _notes(runs: Sequence[Sequence[Run]]) -> list[str]:
    """Names differences that do not forbid the comparison: machines, versions, devices, learning rates."""
    notes = []
    for key in ("CPU", "GPU", "torch", "vmoe_routers", "timm"):
        found = [sorted({run["machine"].get(key, "none") for run in of}) for of in runs]
        if found[0] != found[1]:
            notes.append(f"{key}: {', '.join(found[0])} and {', '.join(found[1])}")
    seeds = [sorted({run["seed"] for run in of}) for of in runs]
    if not set(seeds[0]) & set(seeds[1]):
        found = " and ".join(", ".join(map(str, of)) for of in seeds)
        notes.append(f"seeds: {found}; B - A needs common seeds")
    routers = [{run["variant"]["name"]: run["variant"]["router"] for run in of} for of in runs]
    for name in sorted(routers[0].keys() & routers[1].keys()):
        if routers[0][name] != routers[1][name]:  # own routers of the same name
            notes.append(f"router of {name}: {routers[0][name]} and {routers[1][name]}")
    rates = [{run["variant"]["name"]: run["settings"]["learning_rate"] for run in of} for of in runs]
    for name in sorted(rates[0].keys() & rates[1].keys()):
        if rates[0][name] != rates[1][name]:
            notes.append(f"learning rate of {name}: {rates[0][name]:g} and {rates[1][name]:g}")
    return notes


def _mean(runs: Sequence[Run]) -> Stat | None:
    return stat(map(accuracy, runs)) if runs else None


def _difference(runs: Sequence[Run], others: Sequence[Run]) -> Stat | None:
    values = paired(runs, others, accuracy)
    return stat(values) if values else None


def _cell(value: Stat | None, form: str = ".2f") -> Text:
    if value is None or not math.isfinite(value.mean):
        return Text("-")
    return Text(value.text(form, 100), style="bold" if form[0] == "+" and value.is_clear() else "")
