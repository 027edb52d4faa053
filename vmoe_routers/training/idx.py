"""Files in the IDX format of MNIST."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vmoe_routers.memory import available_memory, in_words
from vmoe_routers.training.error import DataError
from vmoe_routers.training.samples import Data, Tensors

_PIECE = 1 << 20
_MOST_GZIP_SHRINKS = 1032  # largest compression factor of gzip
_AXES_SHOWN = 4


def open_idx_folder(folder: Path) -> Data:
    """Opens a folder with IDX files such as train-images-idx3-ubyte.gz.

    Raises:
        DataError: a file is missing or damaged, or images and labels do not fit.
    """
    parts = [_read_part(folder, part) for part in ("train", "t10k")]
    classes = int(max(part.labels.max() for part in parts)) + 1
    train, test = parts
    return Data(folder.name, train, test, tuple(map(str, range(classes))), 1, train.images.shape[-1])


def _read_part(folder: Path, part: str) -> Tensors:
    images, labels = (read_idx(_find(folder, f"{part}-{kind}-ubyte")) for kind in ("images-idx3", "labels-idx1"))
    if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not images.numel():
        raise DataError(
            f"{folder}: the {part} files do not fit: images {list(images.shape)}, labels {list(labels.shape)}"
        )
    return Tensors(images.unsqueeze(1), labels.long())


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(
        f"{folder}: wanted the folders train/ and val/, each with a folder of images per class, or the files of MNIST; "
        f"there is no {stem} or {stem}.gz, and no train/ folder either"
    )


def read_idx(path: Path) -> Tensor:
    """Reads a file in the IDX format of MNIST, plain or gzipped, into a uint8 tensor of its shape.

    The header is untrusted: reading needs memory for the bytes in the file, not for the size in the header.

    Raises:
        DataError: the file is not an IDX file of bytes, has another length than its header says, or is larger than
            the memory.
    """
    if not path.is_file():  # a pipe would block
        raise DataError(f"{path}: not a regular file")
    opener: Callable = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            start = file.read(4)
            if len(start) < 4 or start[:3] != b"\0\0\x08":
                raise DataError(f"{path}: not an IDX file of bytes (it begins with {start.hex() or 'nothing'})")
            header = file.read(4 * start[3])
            shape = struct.unpack(f">{start[3]}I", header) if len(header) == 4 * start[3] else ()
            size, available = math.prod(shape) if shape else 0, available_memory()
            if available is not None and min(size, _MOST_GZIP_SHRINKS * path.stat().st_size) > available:
                raise DataError(f"{path}: {in_words(size)} of pixels, {in_words(available)} of memory are available")
            raw = bytearray()
            while len(raw) <= size and (piece := file.read(min(_PIECE, size + 1 - len(raw)))):
                raw += piece
    except (OSError, EOFError, MemoryError, zlib.error) as error:
        reason = "not enough memory" if isinstance(error, MemoryError) else error
        raise DataError(f"{path}: cannot be read: {reason}") from error
    if not shape or len(raw) != size:
        says = f"[{', '.join(map(str, shape[:_AXES_SHOWN]))}{', ...' if len(shape) > _AXES_SHOWN else ''}]"
        follow = f"but more than {size} bytes follow" if len(raw) > size else f"but {len(raw)} bytes follow"
        raise DataError(f"{path}: its header says {says}, {follow}")
    return torch.frombuffer(raw, dtype=torch.uint8).view(shape) if raw else torch.empty(shape, dtype=torch.uint8)
