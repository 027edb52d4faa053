"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path` first, so that an interruption or a full disk leaves the old file, and no other.

    Args:
        path: replaced in one step. Its folder exists.
        write: called with the path to write to.

    Raises:
        OSError: names `path`.
    """
    # The process's own name: two processes may write the same file. A link at that place would lead elsewhere.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        partial.unlink(missing_ok=True)
        write(partial)
        partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
