"""read_vmoe: checkpoints in the V-MoE format, which the reference's released models are in. No JAX, no pickle.

A checkpoint of N shards is `P.index` and `P.data-0000i-of-0000N`, each one MessagePack object.

index   {"shard_count": N, "index": nested maps, "version": "20220622" or absent}. A leaf of the maps is an extension
        (code 8) that holds [array, [slice, ...], [shard, ...]]: which parts the array is in, and where each of them is.
        array: a binary that holds [shape, dtype, weak_type, {}]; slice: a binary that holds one binary an axis, each
        with [start, stop, step].
shard   {"__msgpack_array_chunk_a87ca2__": true, "<leaf>": [[[chunk, ...], slice], ...], ...}. <leaf>: the place of the
        array among all, depth first, keys in the order of strings. A chunk is an extension (code 1, or 3 for a numpy
        scalar) that holds [shape, dtype, bytes]; slice: an extension (code 6) with the content that it has above.
        The chunks of a part, one behind the other, are its elements in C order, little-endian.

Nothing in these files is trusted: every length is held against the size of the file before anything is made of it, and
the parts of an array must fill it, each element once, before there is memory for it.
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

_CHUNK, _SCALAR, _SLICE, _LEAF = 1, 3, 6, 8
_MARK = "__msgpack_array_chunk_a87ca2__"
_VERSION = "20220622"
# What is remembered of a file is larger than what says it there. Of ViT-MoEs: some ten thousand, some hundred
_MAX_INDEX_BYTES = 16 << 20
_MAX_CHUNKS = 1 << 20
_MAX_SHARDS = 100_000  # what five digits can number
_MAX_AXES = 32
_MAX_DEPTH = 32

Slice = tuple[tuple[int, int], ...]  # start and stop, one pair an axis


class _Array(NamedTuple):
    """A leaf of the index."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: dict[Slice, int]  # -> shard


class _Chunk(NamedTuple):
    """Bytes of a shard."""

    start: int
    size: int


Chunks = dict[tuple[int, Slice], list[_Chunk]]  # of a part of an array, by the array's number


def read_vmoe(
    prefix: str | os.PathLike[str], *, whole_state: bool = False, progress: Progress | None = None
) -> dict[str, Tensor]:
    """The arrays of a checkpoint in the V-MoE format, by path: `load_flax` takes them.

    prefix       what the file names begin with: `P` where there are `P.index` and `P.data-00000-of-0000N`
    whole_state  a training state holds more than the parameters (step, optimiser). By default only what is below
                 "params/" is read, and that is taken off the paths ("Encoder/encoderblock_0/..."); files without a
                 "params/" hold parameters alone. True: everything, by the paths that are written
    progress     called with the bytes that are read and those that there are to read, after every array

    Tensors on the CPU in the dtypes of the file, bfloat16 among them. Memory: the arrays, and one part (what one device
    held of an array) besides.

    Raises CheckpointError, which names the file: files that are missing, truncated or of another format (Orbax
    directories, TensorFlow's), unknown types, parts that are missing, overlap or are there twice, sizes beyond the
    files' own.
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
            f"{prefix}: a directory. A V-MoE checkpoint P is files (P.index, P.data-00000-of-0000N); the Orbax"
            " directories of the reference's later training runs are another format, which is not read here"
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
            index.fail(f"unknown key {key!r}: no index of the V-MoE format")
    index.end()
    if shard_count is None or arrays is None:
        index.fail("no index of the V-MoE format: shard_count or index is missing")
    # Numbered depth first, keys in the order of strings at every level
    arrays.sort(key=lambda array: array[0])
    for path, array in arrays:
        for shard in array.parts.values():
            if shard >= shard_count:
                index.fail(f"{'/'.join(path)}: in shard {shard}, but there are {shard_count}")
    return [array for _, array in arrays], shard_count


def _keys(reader: Reader, pairs: int) -> Iterator[str]:
    """The keys of a map, each once; the caller reads the value behind each."""
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
            index.fail(f"{key!r} is no name of a parameter or module")
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
            index.skip()  # other files have something here, of no use
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
        overlap = "overlap, or are not this array's" if volume > prod(shape) else "do not cover it"
        index.fail(f"{path}: slices of {volume} elements for shape {list(shape)}, they {overlap}")
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
            reader.fail(f"{path}: slice {start}:{stop}:{step} of an axis of {extent}")
        found.append((start, stop))
    return tuple(found)


def _check_sizes(index: Reader, arrays: list[_Array], available: int) -> None:
    for array in arrays:
        # The product of the extents that are not 0, so that an empty array has no extents beyond belief either
        if prod(extent or 1 for extent in array.shape) * array.dtype.itemsize > max(available, 1 << 16):
            index.fail(
                f"{array.path}: {array.dtype} of shape {list(array.shape)} is more than the data files hold,"
                f" {available} bytes"
            )


# The shards


def _read_contents(shard: Reader, number: int, arrays: list[_Array], chunks: Chunks, room: int) -> int:
    """Adds where the bytes of the parts in this shard lie; none that the index does not have in it.

    room: for so many chunks; gives what is left of it.
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
            shard.fail(f"key {key!r} is no number of one of the {len(arrays)} arrays")
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
                shard.fail(f"{array.path}: slice {_text(part)}, which the index does not have in this file")
            size, stored = _volume(part) * array.dtype.itemsize, sum(piece.size for piece in pieces)
            if stored != size:
                shard.fail(f"{array.path}: chunks of {stored} bytes for slice {_text(part)}, wanted {size}")
            chunks[leaf, part] = pieces
    shard.end()
    if not marked:
        shard.fail(f"no data file of the V-MoE format: {_MARK} is missing")
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
    # Nothing is allocated before all of its bytes are seen to be there.
    for part, shard in array.parts.items():
        if (leaf, part) not in chunks:
            shards[shard].fail(f"{array.path}: slice {_text(part)} is missing")
    if len(array.parts) == 1:  # that covers it
        ((part, shard),) = array.parts.items()
        return _read_part(array.dtype, array.shape, chunks[leaf, part], shards[shard])
    # The volumes of the parts add up to the array's: where no element is there twice, none is missing.
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
