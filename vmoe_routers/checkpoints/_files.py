"""What the readers of files share: opening without surprises, and bytes as tensors without numpy."""

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
"""Called with the bytes that are read and those that there are to read."""


@contextmanager
def open_file(path: str) -> Iterator[tuple[BufferedReader, int]]:
    """A file and its size. CheckpointError where there is none."""
    try:
        # A pipe or a device, of which opening alone could hang, is none.
        regular = stat.S_ISREG(os.stat(path).st_mode)
        file = open(path, "rb") if regular else None  # noqa: SIM115  (closed below; opening has errors of its own)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(f"{path!r}: cannot be opened ({error})") from error
    if file is None:
        raise CheckpointError(f"{path}: not a file")
    with file:
        yield file, os.fstat(file.fileno()).st_size


def as_tensor(buffer: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The little-endian bytes as a tensor, which keeps them."""
    if not buffer:
        return torch.empty(shape, dtype=dtype)
    if dtype == torch.bool:  # which in torch may be no other bytes than 0 and 1
        return (torch.frombuffer(buffer, dtype=torch.uint8) != 0).reshape(shape)
    return torch.frombuffer(buffer, dtype=dtype).reshape(shape)
