"""read_vmoe: reads checkpoints in the V-MoE format of the reference's released models, without JAX or pickle.

A checkpoint of N shards is the files `P.index` and `P.data-0000i-of-0000N`. Each file is one MessagePack object.

index   {"shard_count": N, "index": nested maps, "version": "20220622" or absent}. A leaf of the maps is an extension
        (code 8) that holds [array, [slice, ...], [shard, ...]]: the array, its parts, and the shard of every part.
        array: a binary that holds [shape, dtype, weak_type, {}]. slice: a binary that holds one binary per axis, each
        with [start, stop, step].
shard   {"__msgpack_array_chunk_a87ca2__": true, "<leaf>": [[[chunk, ...], slice], ...], ...}. <leaf>: the number of the
        array in a depth-first walk over the index, with keys in string order. chunk: an extension (code 1, or 3 for a
        numpy scalar) that holds [shape, dtype, bytes]. slice: an extension (code 6) with the content of a slice of the
        index. The concatenated chunks of a part are its elements in C order, little-endian.

The files are treated as untrusted. Every length is checked against the size of the file before it is used. Memory for
an array is allocated only after its parts are known to cover every element exactly once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_routers.checkpoints._files import Progress, as_tensor, open_file
from vmoe_routers.checkpoints._msgpack import Reader
from vmoe_routers.checkpoints.error import CheckpointError

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.bool, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    )
}
"""Dtypes by their names in the files."""

_CHUNK, _SCALAR, _SLICE, _LEAF = 1, 3, 6, 8
_MARK = "__msgpack_array_chunk_a87ca2__"
_VERSION = "20220622"
# Limits: a parsed entry takes more memory than its bytes in the file. The index of a ViT-MoE has tens of thousands of
# bytes, its data files hundreds of chunks.
_MAX_INDEX_BYTES = 16 << 20
_MAX_CHUNKS = 1 << 20
_MAX_SHARDS = 100_000  # file names have five digits
_MAX_AXES = 32
_MAX_DEPTH = 32

Slice = tuple[tuple[int, int], ...]
"""Start and stop, one pair per axis."""


class _Array(NamedTuple):
    """Leaf of the index."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: dict[Slice, int]  # shard of every part


class _Chunk(NamedTuple):
    """Position and number of a chunk's bytes in a shard."""

    start: int
    size: int


Chunks = dict[tuple[int, Slice], list[_Chunk]]
"""Chunks of every part, by the number of the array and the slice of the part."""


def read_vmoe(
    prefix: str | os.PathLike[str], *, whole_state: bool = False, progress: Progress | None = None
) -> dict[str, Tensor]:
    """Reads the arrays of a checkpoint in the V-MoE format by path, for `load_flax`.

    Memory holds the arrays and one part of an array at a time.

    Args:
        prefix: Common start of the file names: `P` for `P.index` and `P.data-00000-of-0000N`.
        whole_state: False: in a training state, which also holds step and optimiser, reads only the parameters, the
            paths below "params/", without that prefix. True: reads all arrays by their full paths. A file without
            "params/" holds only parameters.
        progress: Called after every array with the bytes read so far and the bytes to read in all.

    Returns:
        Tensors on the CPU in the dtypes of the file, bfloat16 included.

    Raises:
        CheckpointError: A file is missing, truncated, or of another format (such as Orbax or TensorFlow). Or a dtype
            is unknown, parts are missing, overlap or occur twice, or a size exceeds the files.
    """
    prefix = os.fspath(prefix)
    _refuse_other_formats(prefix)
    with ExitStack() as files:

        def reader(name: str) -> Reader:
            path = f"{prefix}.{name}"
            return Reader(*files.enter_context(open_file(path)), path)

        index = reader("index")
        if index.size > _MAX_INDEX_BYTES:
            index.fail(f"{index.size} bytes, wanted an index of at most {_MAX_INDEX_BYTES}")
        arrays, shard_count = _read_index(index)
        shards = [reader(f"data-{i:05d}-of-{shard_count:05d}") for i in range(shard_count)]
        _check_sizes(index, arrays, sum(shard.size for shard in shards))
        chunks: Chunks = {}
        room = _MAX_CHUNKS
        for i, shard in enumerate(shards):
            room = _read_contents(shard, i, arrays, chunks, room)
        wanted = {i: array.path for i, array in enumerate(arrays)}
        if not whole_state and any(path.startswith("params/") for path in wanted.values()):
            wanted = {i: path.removeprefix("params/") for i, path in wanted.items() if path.startswith("params/")}
        total = sum(_bytes(arrays[i]) for i in wanted)
        found, done = {}, 0
        for i, path in wanted.items():
            found[path] = _read_array(i, arrays[i], chunks, shards, index)
            done += _bytes(arrays[i])
            if progress is not None:
                progress(done, total)
    return found


def _refuse_other_formats(prefix: str) -> None:
    if os.path.isdir(prefix) and not os.path.exists(f"{prefix}.index"):
        raise CheckpointError(
            f"{prefix}: a directory, wanted the prefix P of a V-MoE checkpoint (P.index, P.data-00000-of-0000N); Orbax"
            " directories, which later versions of the reference write, are not supported"
        )


# The index


def _read_index(index: Reader) -> tuple[list[_Array], int]:
    shard_count, arrays = None, None
    for key in _keys(index, index.pairs("the index")):
        if key == "shard_count":
            shard_count = index.integer("shard_count")
            if shard_count > _MAX_SHARDS:
                index.fail(f"shard_count is {shard_count}, wanted at most {_MAX_SHARDS}")
        elif key == "index":
            arrays = list(_read_tree(index, ()))
        elif key == "version":
            version = index.text("version")
            if version != _VERSION:
                index.fail(f"version {version!r}, wanted {_VERSION!r} or none")
        else:
            index.fail(f"unknown key {key!r}: not an index of the V-MoE format")
    index.end()
    if shard_count is None or arrays is None:
        index.fail("not an index of the V-MoE format: shard_count or index is missing")
    # Data files number the arrays depth first, with keys in string order at every level.
    arrays.sort(key=lambda array: array[0])
    for path, array in arrays:
        for shard in array.parts.values():
            if shard >= shard_count:
                index.fail(f"{'/'.join(path)}: in shard {shard}, wanted one of {shard_count} shards")
    return [array for _, array in arrays], shard_count


def _keys(reader: Reader, pairs: int) -> Iterator[str]:
    """Reads the keys of a map and refuses duplicates. The caller reads the value after each key."""
    seen = set()
    for _ in range(pairs):
        key = reader.text("a key")
        if key in seen:
            reader.fail(f"key {key!r} twice")
        seen.add(key)
        yield key


def _read_tree(index: Reader, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], _Array]]:
    if len(path) > _MAX_DEPTH:
        index.fail("nested too deeply")
    for key in _keys(index, index.pairs("/".join(path) or "index")):
        if key in ("", ".", "..") or any(character in key for character in "/\\\0"):
            index.fail(f"{key!r} is not a name of a parameter or module")
        here = (*path, key)
        if index.at_pairs():
            yield from _read_tree(index, here)
        else:
            yield here, _read_leaf(index, "/".join(here))


def _read_leaf(index: Reader, path: str) -> _Array:
    with index.extension(path, _LEAF):
        index.elements(path, 3)
        with index.binary(f"{path}: array"):
            index.elements(f"{path}: array", 4)
            shape = _read_shape(index, path)
            dtype = _read_dtype(index, path)
            index.skip()  # weak_type
            index.skip()  # the empty map, which some files fill with unused data
        slices = []
        for _ in range(index.elements(f"{path}: slices")):
            with index.binary(f"{path}: slice"):
                slices.append(_read_slice(index, path, shape))
        index.elements(f"{path}: shards", len(slices))
        shards = [index.integer(f"{path}: shard") for _ in slices]
    parts = dict(zip(slices, shards, strict=True))
    if len(parts) < len(slices):
        index.fail(f"{path}: slice {_text(Counter(slices).most_common(1)[0][0])} twice")
    volume = sum(map(_volume, parts))
    if volume != prod(shape):
        fault = "overlap or exceed" if volume > prod(shape) else "do not cover"
        index.fail(f"{path}: slices of {volume} elements {fault} the array of shape {list(shape)}")
    return _Array(path, shape, dtype, parts)


def _read_shape(reader: Reader, path: str) -> tuple[int, ...]:
    axes = reader.elements(f"{path}: shape")
    if axes > _MAX_AXES:
        reader.fail(f"{path}: {axes} axes, wanted at most {_MAX_AXES}")
    return tuple(reader.integer(f"{path}: an extent of the shape") for _ in range(axes))


def _read_dtype(reader: Reader, path: str) -> torch.dtype:
    name = reader.text(f"{path}: dtype")
    if name not in DTYPES:
        reader.fail(f"{path}: unknown dtype {name!r}, wanted one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _read_slice(reader: Reader, path: str, shape: tuple[int, ...]) -> Slice:
    found = []
    reader.elements(f"{path}: slice", len(shape))
    for extent in shape:
        with reader.binary(f"{path}: slice of an axis"):
            reader.elements(f"{path}: slice of an axis", 3)
            start = reader.integer_or_nil(f"{path}: start of a slice") or 0
            stop = reader.integer_or_nil(f"{path}: stop of a slice")
            step = reader.integer_or_nil(f"{path}: step of a slice")
        stop = extent if stop is None else stop
        if not start <= stop <= extent or step not in (None, 1):
            reader.fail(f"{path}: slice {start}:{stop}:{step} is not within an axis of {extent} at step 1")
        found.append((start, stop))
    return tuple(found)


def _check_sizes(index: Reader, arrays: list[_Array], available: int) -> None:
    for array in arrays:
        # Multiply the extents that are not 0, because an empty array must not have huge extents either.
        if prod(extent or 1 for extent in array.shape) * array.dtype.itemsize > max(available, 1 << 16):
            index.fail(
                f"{array.path}: {array.dtype} of shape {list(array.shape)} is more than the data files hold,"
                f" {available} bytes"
            )


# The shards


def _read_contents(shard: Reader, number: int, arrays: list[_Array], chunks: Chunks, room: int) -> int:
    """Adds the chunks of the parts in this shard. A part that the index assigns to another shard is an error.

    Args:
        shard: The data file.
        number: Its number.
        arrays: The leaves of the index.
        chunks: Collects the chunks.
        room: The most chunks that may be added.

    Returns:
        The most chunks that the next shards may add.
    """
    marked = False
    for key in _keys(shard, shard.pairs("a data file")):
        if key == _MARK:
            shard.true(_MARK)
            marked = True
            continue
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and str(int(key)) == key) or int(key) >= len(
            arrays
        ):
            shard.fail(f"key {key!r} is not the number of one of the {len(arrays)} arrays")
        leaf, array = int(key), arrays[int(key)]
        for _ in range(shard.elements(array.path)):
            shard.elements(f"{array.path}: part", 2)
            room -= (count := shard.elements(f"{array.path}: chunks"))
            if room < 0:
                shard.fail(f"{array.path}: more than {_MAX_CHUNKS} chunks in all")
            pieces = [_read_chunk(shard, array) for _ in range(count)]
            with shard.extension(f"{array.path}: slice", _SLICE):
                part = _read_slice(shard, array.path, array.shape)
            if (leaf, part) in chunks:
                shard.fail(f"{array.path}: slice {_text(part)} twice")
            if array.parts.get(part) != number:
                shard.fail(f"{array.path}: slice {_text(part)}, which the index does not list for this file")
            size, stored = _volume(part) * array.dtype.itemsize, sum(piece.size for piece in pieces)
            if stored != size:
                shard.fail(f"{array.path}: chunks of {stored} bytes for slice {_text(part)}, wanted {size}")
            chunks[leaf, part] = pieces
    shard.end()
    if not marked:
        shard.fail(f"not a data file of the V-MoE format: {_MARK} is missing")
    return room


def _read_chunk(shard: Reader, array: _Array) -> _Chunk:
    with shard.extension(f"{array.path}: chunk", _CHUNK, _SCALAR):
        shard.elements(f"{array.path}: chunk", 3)
        shape = _read_shape(shard, f"{array.path}: chunk")
        dtype = _read_dtype(shard, f"{array.path}: chunk")
        start, size = shard.skip_binary(f"{array.path}: chunk")
    if dtype != array.dtype:
        shard.fail(f"{array.path}: chunk of {dtype}, the index says {array.dtype}")
    if size != prod(shape) * dtype.itemsize:
        shard.fail(f"{array.path}: chunk of {size} bytes for {dtype} of shape {list(shape)}")
    return _Chunk(start, size)


# The arrays


def _read_array(leaf: int, array: _Array, chunks: Chunks, shards: list[Reader], index: Reader) -> Tensor:
    # Check that all parts are present before memory is allocated.
    for part, shard in array.parts.items():
        if (leaf, part) not in chunks:
            shards[shard].fail(f"{array.path}: slice {_text(part)} is missing")
    if len(array.parts) == 1:  # the part covers the array
        ((part, shard),) = array.parts.items()
        return _read_part(array.dtype, array.shape, chunks[leaf, part], shards[shard])
    # The volumes of the parts add up to the volume of the array. So if no parts overlap, no element is missing.
    covered = torch.zeros(array.shape, dtype=torch.bool)
    for part in array.parts:
        view = covered[_indices(part)]
        if view.any():
            index.fail(f"{array.path}: slice {_text(part)} overlaps another")
        view.fill_(True)
    result = torch.empty(array.shape, dtype=array.dtype)
    for part, shard in array.parts.items():
        view = result[_indices(part)]
        view.copy_(_read_part(array.dtype, tuple(view.shape), chunks[leaf, part], shards[shard]))
    return result


def _read_part(dtype: torch.dtype, shape: tuple[int, ...], pieces: list[_Chunk], shard: Reader) -> Tensor:
    buffer = bytearray(prod(shape) * dtype.itemsize)
    place = 0
    for piece in pieces:
        shard.read_into(memoryview(buffer)[place : place + piece.size], piece.start)
        place += piece.size
    return as_tensor(buffer, dtype, shape)


def _indices(part: Slice) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in part)


def _volume(part: Slice) -> int:
    return prod(stop - start for start, stop in part)


def _bytes(array: _Array) -> int:
    return prod(array.shape) * array.dtype.itemsize


def _text(part: Slice) -> str:
    return "[" + ", ".join(f"{start}:{stop}" for start, stop in part) + "]"
