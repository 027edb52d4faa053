"""Helpers of the readers: open regular files only, and make tensors from bytes without numpy."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader

import torch
from torch import Tensor

from vmoe_routers.checkpoints.error import CheckpointError

Progress = Callable[[int, int], None]
"""Function that is called with the bytes read so far and the bytes to read in all."""


@contextmanager
def open_file(path: str) -> Iterator[tuple[BufferedReader, int]]:
    """Opens a regular file. Yields the file and its size.

    Raises:
        CheckpointError: The path is not a regular file, or cannot be opened.
    """
    try:
        # Regular files only: opening a pipe or device could block.
        regular = stat.S_ISREG(os.stat(path).st_mode)
        file = open(path, "rb") if regular else None  # noqa: SIM115  (closed below; this try handles errors of opening)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(f"{path!r}: cannot be opened ({error})") from error
    if file is None:
        raise CheckpointError(f"{path}: not a regular file")
    with file:
        yield file, os.fstat(file.fileno()).st_size


def as_tensor(buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Makes a tensor that shares the memory of these little-endian bytes."""
    if not buffer:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:  # torch requires the bytes 0 and 1 in a bool tensor
        return (torch.frombuffer(buffer, dtype=torch.uint8) != 0).reshape(shape)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
