"""Log of a training: CSV files, a progress bar, and TensorBoard if it is installed."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vmoe_routers.files import naming, write_whole
from vmoe_routers.training.evaluation import Evaluation

LOG, EVALUATIONS = "log.csv", "evaluations.csv"
SILENCE = 60.0
"""Least number of seconds between two lines of progress without a terminal."""
_COLUMNS = {LOG: {"step", "loss"}, EVALUATIONS: {"step", "loss", "top1"}}  # columns that are read


class Outputs:
    """Context manager for the log, the evaluations and the progress bar of a training.

    Args:
        folder: The training's folder.
        console: Console that shows progress.
        step, steps: First step and number of steps.
        writes: Whether this process writes files.
    """

    def __init__(self, folder: Path, console: Console, step: int, steps: int, writes: bool):
        self.writes = writes
        self.bar: Bar = Bar(console, step, steps)
        if writes:
            self.log_table: Table = Table(folder / LOG, step)
            self.evaluations: Table = Table(folder / EVALUATIONS, step)
            self.board: Board = Board(folder / "tensorboard", step)

    def __enter__(self) -> Outputs:
        self.bar.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.__exit__()
        if self.writes:
            self.board.close()

    @property
    def lack_evaluation(self) -> bool:
        """Whether this process writes files and has written no evaluation."""
        return self.writes and not self.evaluations.rows

    def advance(self) -> None:
        """Counts a step."""
        self.bar.advance()

    def log(self, row: Mapping[str, Any], layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Writes and shows the values of `Meter.row`. Writes the metrics of the MoE layers, by name, to TensorBoard."""
        if not self.writes:
            return
        self.log_table.add(row)
        self.board.add(row["step"], {f"train/{name}": value for name, value in row.items()})
        for layer, metrics in layers.items():
            self.board.add(row["step"], {f"routing/{layer}/{name}": value for name, value in metrics.items()})
        shown = [f"loss {row['loss']:.3f}", f"{row['images_per_second']:.0f} images/s"]
        if row["load_cv"] != "":
            shown += [f"load cv {row['load_cv']:.2f}", f"dropped {row['dropped']:.1%}"]
        if self.evaluations.rows:
            shown.append(f"accuracy {float(self.evaluations.rows[-1]['top1']):.3f}")
        self.bar.show("  ".join([*shown, f"data wait {row['data_wait']:.0%}"]))

    def evaluated(self, step: int, epoch: float, found: Evaluation) -> None:
        """Writes and shows an evaluation."""
        if not self.writes:
            return
        values = {"top1": found.top1, "top5": found.top5, "loss": found.loss}
        values |= {"calibration_error": found.calibration_error, "images_per_second": found.images_per_second}
        self.evaluations.add({"step": step, "epoch": epoch, **values})
        self.board.add(step, {f"test/{name}": value for name, value in values.items()})
        self.bar.console.print(
            f"epoch {epoch:6.2f}  step {step:7}  accuracy {found.top1:.4f}  loss {found.loss:.4f}", highlight=False
        )


class Table:
    """CSV file that grows row by row. Every row has a step.

    Args:
        path: The file.
        step: The step from which the training continues. Rows of later steps are deleted.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.rows: list[dict[str, str]] = [row for row in read_table(path) if int(row["step"]) <= step] if step else []
        write_whole(path, self._write)

    def _write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            if self.rows:
                writer = csv.DictWriter(file, list(self.rows[0]))
                writer.writeheader()
                writer.writerows(self.rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row. The first row sets the columns."""
        self.rows.append({name: _short(value) for name, value in row.items()})
        with naming(self.path), self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0]), extrasaction="ignore")
            if len(self.rows) == 1:
                writer.writeheader()
            writer.writerow(self.rows[-1])


def read_table(path: Path) -> list[dict[str, str]]:
    """Reads the rows of `LOG` or `EVALUATIONS`, except a last line without its end. Returns no rows without a file.

    Raises:
        ValueError: A line is damaged. The message names the file and the line.
        OSError: The file cannot be read.
    """
    if not path.is_file():
        return []
    names, rows = [], []
    for number, line in enumerate(path.read_bytes().decode(errors="replace").split("\n")[:-1], 1):
        values = line.removesuffix("\r").split(",")
        if number == 1:
            names = values
            is_good = _COLUMNS[path.name] <= {*names}
        else:
            rows.append(dict(zip(names, values, strict=False)))
            is_good = len(values) == len(names) and _is_row(rows[-1], _COLUMNS[path.name])
        if not is_good:
            raise ValueError(f"{path}, line {number}: damaged; delete the file to continue without its rows")
    return rows


def _is_row(row: Mapping[str, str], filled: Set[str]) -> bool:
    """Tells whether the step is a whole number, all other values are numbers or empty, and `filled` are not empty."""
    try:
        int(row["step"])
        for name, value in row.items():
            if value or name in filled:
                float(value)
    except ValueError:
        return False
    return True


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


class Bar:
    """Progress bar over the steps of a training on a terminal, and elsewhere a line of progress at most once a minute.

    Args:
        console: Console that shows the bar.
        step, steps: First step and number of steps.
    """

    def __init__(self, console: Console, step: int, steps: int):
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID = self._progress.add_task("step", total=steps, completed=step, values="")
        self._told = time.monotonic()

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        """Counts a step."""
        self._progress.advance(self._task)

    def show(self, values: str) -> None:
        """Shows values after the bar, or in a line of their own."""
        self._progress.update(self._task, values=values)
        if not self.console.is_terminal and time.monotonic() - self._told >= SILENCE:
            self._told = time.monotonic()
            task = self._progress.tasks[self._task]
            self.console.print(
                f"step {task.completed:.0f} of {task.total:.0f}  {values}", highlight=False, soft_wrap=True
            )


class Board:
    """Events of a training for TensorBoard. Does nothing if the package tensorboard is missing.

    Args:
        folder: The folder of the events.
        step: The step from which the training continues. TensorBoard ignores earlier events of later steps.
    """

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._writer = None
        else:
            with naming(folder):
                self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the values that are numbers."""
        if self._writer is not None:
            with naming(self.folder):
                for name, value in values.items():
                    if isinstance(value, (int, float)):
                        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes the file of events."""
        if self._writer is not None:
            with naming(self.folder):
                self._writer.close()
