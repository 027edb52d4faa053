"""kept_model: the model that a study kept for a run, found by the record of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vmoe_routers.checkpoints.pretrained import CONFIG
from vmoe_routers.study.records import RecordError, read_record, run_by_name


def kept_model(path: Path) -> tuple[Path, dict[str, Any]]:
    """Finds the model that a study kept for a run.

    Args:
        path: The record of the run, a file in the folder "runs" of a study.

    Returns:
        The folder of the model, for `from_pretrained`, and the record.

    Raises:
        RecordError: The file is not the record of a run, or the study kept no model.
        OSError: The file cannot be opened.
    """
    try:
        record = read_record(path, run_by_name())
    except RecordError as error:
        raise RecordError(f"{error}; wanted the record of a run, runs/*-seed*.json in a study's folder") from None
    if record is None:
        raise RecordError(f"{path}: no such file")
    folder = path.parent.parent / "models" / path.stem
    if not (folder / CONFIG).is_file():
        raise RecordError(
            f"{path}: the study kept no model of this run, {folder} is missing; the study's command with --save-models "
            "(vmoe-routers study ... --save-models) trains it again and keeps it"
        )
    return folder, record
