"""Contents of a study's folder: study.json names the records that belong to the study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vmoe_routers.files import write_whole
from vmoe_routers.study.images import StudyData
from vmoe_routers.study.jobs import Job, Timing
from vmoe_routers.study.records import (
    RECORD_VERSION,
    RecordError,
    fingerprint,
    read_record,
    some_run,
    timing_record,
)
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.summary import chance_accuracy
from vmoe_routers.study.timing import ROUNDS

CONTENTS = "study.json"


def write_contents(settings: Settings, data: StudyData, jobs: Sequence[Job], timing: Timing) -> None:
    """Writes study.json: the settings, the images, and the names of the records."""
    contents = {
        "version": RECORD_VERSION,
        "data": data.name,
        "images": fingerprint(data, None),
        "settings": asdict(settings),
        "runs": [job.path.name for job in jobs],
        "timing": timing.path.name,
        "chance": chance_accuracy(data.test_labels),
    }
    text = json.dumps(contents, indent=1, default=str) + "\n"
    write_whole(settings.output / CONTENTS, lambda partial: partial.write_text(text, encoding="utf-8"))


def add_timing(run: dict[str, Any], timed: dict[str, Any]) -> None:
    """Adds the times of the variant's steps to the record of its run. Runs of ablations have no times."""
    if run["variant"]["name"] in timed["step_ms"]:
        run["timing"] = timed | {"step_ms": timed["step_ms"][run["variant"]["name"]]}


def read_contents(folder: Path) -> dict[str, Any]:
    """Reads study.json.

    Raises:
        RecordError: The folder holds no study, or one of another version.
        OSError: The file cannot be opened.
    """
    path = folder / CONTENTS
    if path.exists() and not path.is_file():  # a pipe would block
        raise RecordError(f"{path}: not a regular file")
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RecordError(f"{folder}: holds no study, {CONTENTS} is missing") from None
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: no description of a study, {error}") from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != RECORD_VERSION:
        raise RecordError(f"{path}: records of version {version!r}, wanted version {RECORD_VERSION}")
    runs = found.get("runs")
    if not isinstance(runs, list) or not all(isinstance(name, str) for name in runs):
        raise RecordError(f"{path}: no description of a study, runs must be a list of file names")
    for name, kind in (("settings", dict), ("data", str), ("timing", str)):
        if not isinstance(found.get(name), kind):
            raise RecordError(f"{path}: no description of a study, {name} must be a {kind.__name__}")
    if not isinstance(found.get("chance"), float | None):
        raise RecordError(f"{path}: no description of a study, chance must be a float")
    return found


def read_runs(folder: Path | str, contents: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Reads the finished runs of a study, for `summarise`, `decide` and `figures.draw`.

    Args:
        folder: The output folder of the study.
        contents: The content of its study.json, if that was read before.

    Returns:
        The records, which `vmoe_routers.study.summary` describes.

    Raises:
        RecordError: The folder holds no study, a record is damaged, or two records are of the same run.
        OSError: A file cannot be opened.
    """
    folder = Path(folder)
    contents = contents or read_contents(folder)
    timed = read_record(folder / "runs" / Path(contents["timing"]).name, timing_record(ROUNDS))
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name in dict.fromkeys(Path(name).name for name in contents["runs"]):
        run = read_record(folder / "runs" / name, some_run())
        if run is None:
            continue
        key = run["variant"]["name"], run["seed"]
        if key in found:
            raise RecordError(f"{folder / 'runs' / name}: a second record of {key[0]} with seed {key[1]}")
        if timed is not None:
            add_timing(run, timed)
        found[key] = run
    return list(found.values())
