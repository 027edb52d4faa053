"""Results as CSV files.

Lines `# key: JSON` describe the machine and the run. One row per case, direction and variant follows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

CASE = ("op", "title", "size", "default", "threads", "direction")
VARIANT = ("name", "role", "seconds", "called_seconds", "waits", "saved_bytes", "peak_bytes", "different")
RATIO = ("median", "low", "high")
FLOOR = ("seconds", "by", "flops", "bytes", "exps")
# Columns of a row. The columns ratio_* belong to the variant. The columns floor_* and again (the median of the A/A
# ratios) belong to the case.
COLUMNS = (
    *CASE,
    *VARIANT,
    *(f"ratio_{name}" for name in RATIO),
    *(f"floor_{name}" for name in FLOOR),
    "again",
    "unstable",
)
SKIPPED = "skipped"  # role of a variant that was not measured; the column `different` has the reason


def write_table(path: Path, about: dict[str, Any], columns: Iterable[str], rows: Iterable[dict[str, Any]]) -> None:
    """Writes rows: floats with six digits, True as "yes", False and None as empty cells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for key, value in about.items():
            file.write(f"# {key}: {json.dumps(_rounded(value))}\n")
        table = csv.DictWriter(file, list(columns), lineterminator="\n")
        table.writeheader()
        table.writerows({name: _text(value) for name, value in row.items()} for row in rows)


def read_table(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Reads a file of `write_table`. An empty cell is None."""
    with path.open(newline="") as file:
        lines = file.readlines()
    head = [line for line in lines if line.startswith("# ")]
    about = {key: json.loads(value) for key, _, value in (line[2:].partition(": ") for line in head)}
    rows = csv.DictReader(lines[len(head) :])
    return about, [{name: _value(text) for name, text in row.items()} for row in rows]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _text(value: Any) -> Any:
    if value is None or isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.6g}" if isinstance(value, float) else value


def _value(text: str) -> Any:
    if text in ("", "yes"):
        return True if text else None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def write_run(report: dict[str, Any], path: Path) -> None:
    """Writes a report of `benchmarks.run`. Targets are left out: they follow from the results."""
    about = {key: value for key, value in report.items() if key not in ("results", "targets")}
    write_table(path, about, COLUMNS, (row for result in report["results"] for row in _rows(result)))


def _rows(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    same = {name: result[name] for name in CASE}
    floor = {f"floor_{name}": result["floor"][name] for name in FLOOR}
    for v in result["variants"]:
        ratio = {f"ratio_{name}": v["ratio"][name] for name in RATIO}
        mine = {name: v[name] for name in VARIANT}
        yield {**same, **mine, **ratio, **floor, "again": result["again"]["median"], "unstable": result["unstable"]}
    for line in result["skipped"]:
        name, _, why = line.partition(": ")
        yield {**same, "name": name, "role": SKIPPED, "different": why}


def read_run(path: Path) -> dict[str, Any]:
    """Reads a file of `write_run` into the report that pages, figures and targets need."""
    about, rows = read_table(path)
    results = [_result(list(group)) for _, group in groupby(rows, lambda row: tuple(row[name] for name in CASE))]
    return {**about, "results": results}


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    measured = [row for row in rows if row["role"] != SKIPPED]
    first = measured[0]
    return {
        **{name: first[name] for name in CASE},
        "default": bool(first["default"]),
        "floor": {name: first[f"floor_{name}"] for name in FLOOR},
        "again": {"median": first["again"]},
        "unstable": bool(first["unstable"]),
        "skipped": [f"{row['name']}: {row['different']}" for row in rows if row["role"] == SKIPPED],
        "variants": [
            {
                **{name: row[name] for name in VARIANT},
                "waits": bool(row["waits"]),
                "different": row["different"] or "",
                "ratio": {name: row[f"ratio_{name}"] for name in RATIO},
            }
            for row in measured
        ],
    }
