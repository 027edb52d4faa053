"""Jobs of a study: runs and the timing, each with the path of its record."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from vmoe_routers.study.records import read_record, read_run, timing_record
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.timing import ROUNDS
from vmoe_routers.study.variants import Variant
from vmoe_routers.training import Images


class Job(NamedTuple):
    """Run of a variant with a seed, and the path of its record."""

    variant: Variant
    seed: int
    path: Path

    def model_folder(self, settings: Settings) -> Path | None:
        """Returns the folder of the trained model; None for a study that keeps no models."""
        return settings.output / "models" / self.path.stem if settings.save_models else None

    def read(self, settings: Settings, transfer: Images | None) -> dict[str, Any] | None:
        """Reads the record. Returns None if there is none, or if the model that belongs to it is missing.

        Raises:
            RecordError: The record is damaged.
        """
        folder = self.model_folder(settings)
        if folder is not None and not (folder / "config.json").is_file():
            return None
        return read_run(self.path, settings, self.variant, self.seed, transfer and transfer.name)


class Timing(NamedTuple):
    """Timing of the variants' steps, and the path of its record."""

    variants: list[Variant]
    path: Path

    def read(self) -> dict[str, Any] | None:
        """Reads the record. Returns None if there is none or it lacks a variant.

        Raises:
            RecordError: The record is damaged.
        """
        record = read_record(self.path, timing_record(ROUNDS))
        return record if record and {variant.name for variant in self.variants} <= set(record["step_ms"]) else None
