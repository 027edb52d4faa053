"""Writes files completely or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vmoe_routers.options import OptionError


def make_output(folder: Path) -> None:
    """Makes the folder of the option ``output``, before anything is computed for it.

    Raises:
        OptionError: The folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError(f"output {str(folder)!r} cannot be made: {error.strerror}", "output") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OptionError(f"output {str(folder)!r} cannot be written", "output")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file under a temporary name, then renames it. A failure leaves the old file and no partial file.

    Args:
        path: The file, which is replaced in one step. Its folder must exist.
        write: A function that writes to the path it is called with.

    Raises:
        OSError: The file cannot be written. The error names `path`.
    """
    # The name contains the process id, because two processes may write the same file. Remove a link of this name first,
    # because `write` would follow the link.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(path):
            partial.unlink(missing_ok=True)
            write(partial)
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an OSError that is raised within the context. The error of a full disk names no file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Writes rows of equal columns to a CSV file, completely or not at all. None becomes an empty field.

    Args:
        path: The file. Its folder must exist.
        rows: Values by column.
        columns: Names of the columns, by default the columns of the first row.

    Raises:
        OSError: The file cannot be written.
    """

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns if columns is not None else list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, write)
