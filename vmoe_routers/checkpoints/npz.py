"""read_npz: reads numpy's npz archives, the format of the reference's dense ViTs, without pickle or numpy."""

from __future__ import annotations

import os
import re
import struct
import zipfile
import zlib
from math import prod
from typing import IO

import torch
from torch import Tensor

from vmoe_routers.checkpoints._files import Progress, as_tensor, open_file
from vmoe_routers.checkpoints.error import CheckpointError

_DTYPES = {
    "|b1": torch.bool,
    "|V2": torch.bfloat16,
    "<V2": torch.bfloat16,
    **{f"{'|' if n == 1 else '<'}i{n}": getattr(torch, f"int{8 * n}") for n in (1, 2, 4, 8)},
    **{f"{'|' if n == 1 else '<'}u{n}": getattr(torch, f"uint{8 * n}") for n in (1, 2, 4, 8)},
    **{f"<f{n}": getattr(torch, f"float{8 * n}") for n in (2, 4, 8)},
}
"""Dtypes by their names in numpy. numpy has no bfloat16: JAX writes bfloat16 as V2, two bytes without a type."""

_HEADER = re.compile(
    r"\{'descr': '(?P<dtype>[^']{1,8})', 'fortran_order': (?P<fortran>True|False), "
    r"'shape': \((?P<shape>|\d{1,18},|\d{1,18}(?:, \d{1,18}){1,31})\), \} *\n"
)
_MAX_HEADER_BYTES = 10_000  # numpy has the same limit
_MAX_EXPANSION = 64  # parameters compress by about a tenth, a zip bomb by a factor of 1000
_MAX_ARRAYS = 100_000
_PIECE = 1 << 24
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # numpy writes only these; more decoders are attack surface
_ENCRYPTED = 1  # flag bit of an archive's member
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    MemoryError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def read_npz(path: str | os.PathLike[str], *, progress: Progress | None = None) -> dict[str, Tensor]:
    """Reads the arrays of an npz file by name ("Transformer/encoderblock_0/..."), for `load_flax`.

    The file is treated as untrusted: nothing is unpickled, and an archive must not expand to more than 64 times its
    size.

    Args:
        path: The file.
        progress: Called after every array with the bytes read so far and the bytes to read in all.

    Returns:
        Tensors on the CPU in the dtypes of the file. V2 of numpy (two bytes without a type) becomes bfloat16.

    Raises:
        CheckpointError: The file is missing, damaged, truncated or not an npz file. Or a member is neither stored nor
            deflated, is not numeric, or has a size that contradicts its shape. Or memory does not suffice.
    """
    path = os.fspath(path)
    found: dict[str, Tensor] = {}
    with open_file(path) as (file, size):
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                total, done = sum(entry.file_size for entry in entries), 0
                if len(entries) > _MAX_ARRAYS or total > _MAX_EXPANSION * size:
                    raise CheckpointError(
                        f"{path}: would expand to {len(entries)} arrays of {total} bytes, wanted at most {_MAX_ARRAYS},"
                        f" and {_MAX_EXPANSION} times the file's {size} bytes"
                    )
                for entry in entries:
                    name = entry.filename.removesuffix(".npy")
                    if name in found or name == entry.filename:
                        problem = "in the file twice" if name in found else "no array, wanted an npz file of numpy"
                        raise CheckpointError(f"{path}: {name!r} is {problem}")
                    _check_entry(entry, size, f"{path}: {name}")
                    with archive.open(entry) as member:
                        found[name] = _read_array(member, entry.file_size, f"{path}: {name}")
                    done += entry.file_size
                    if progress is not None:
                        progress(done, total)
        except CheckpointError:
            raise
        except _DAMAGED as error:
            reason = "not enough memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
            raise CheckpointError(f"{path}: not an npz file, or damaged ({reason})") from error
    return found


def _check_entry(entry: zipfile.ZipInfo, size: int, name: str) -> None:
    """Refuses members that numpy does not write. `size` is the size of the archive."""
    if entry.compress_type not in _COMPRESSIONS or entry.flag_bits & _ENCRYPTED:
        kind = "encrypted" if entry.flag_bits & _ENCRYPTED else f"compressed by method {entry.compress_type}"
        raise CheckpointError(f"{name}: {kind}, wanted a stored or deflated member")
    stored = entry.compress_type == zipfile.ZIP_STORED
    if entry.compress_size > size or (stored and entry.compress_size != entry.file_size):
        raise CheckpointError(
            f"{name}: {entry.compress_size} stored bytes for {entry.file_size} bytes contradict a file of {size} bytes"
        )


def _read_array(member: IO[bytes], size: int, name: str) -> Tensor:
    """Reads one npy file (numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""
    start = member.read(8)
    if start[:6] != b"\x93NUMPY" or start[6:] not in (b"\x01\x00", b"\x02\x00", b"\x03\x00"):
        raise CheckpointError(f"{name}: not an array in numpy's format")
    width = 2 if start[6] == 1 else 4
    length = int.from_bytes(member.read(width), "little")
    if length > _MAX_HEADER_BYTES:
        raise CheckpointError(f"{name}: a header of {length} bytes, wanted at most {_MAX_HEADER_BYTES}")
    text = member.read(length).decode("latin-1")
    header = _HEADER.fullmatch(text)
    if header is None or header["dtype"] not in _DTYPES:
        kind = repr(header["dtype"]) if header else text[:80].strip()
        raise CheckpointError(f"{name}: dtype or header {kind}, wanted one of {', '.join(_DTYPES)}")
    dtype, shape = _DTYPES[header["dtype"]], tuple(int(n) for n in header["shape"].split(",") if n)
    left = size - 8 - width - length
    if prod(shape) * dtype.itemsize != left or max(shape, default=0) > size:
        raise CheckpointError(f"{name}: {dtype} of shape {list(shape)} contradicts its size of {left} bytes")
    buffer = bytearray()  # grows with the bytes read, not with the declared size
    while len(buffer) < left and (piece := member.read(min(_PIECE, left - len(buffer)))):
        buffer += piece
    if len(buffer) != left or member.read(1):
        raise CheckpointError(f"{name}: truncated, {len(buffer)} bytes of {left}")
    if header["fortran"] == "True":
        return as_tensor(buffer, dtype, shape[::-1]).permute(*reversed(range(len(shape)))).contiguous()
    return as_tensor(buffer, dtype, shape)
