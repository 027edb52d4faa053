"""Writes V-MoE checkpoints, as vmoe_routers/checkpoints/vmoe.py describes them, and the MessagePack in them."""

import struct
from itertools import product

import torch

MARK = "__msgpack_array_chunk_a87ca2__"


class Ext:
    def __init__(self, code, data):
        self.code, self.data = code, data


class Pairs(list):
    """A map that may contain a key twice."""


def pack(value):
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        return struct.pack(">Bq", 0xD3, value) if value < 0 else struct.pack(">BQ", 0xCF, value)
    if isinstance(value, str):
        data = value.encode()
        return struct.pack(">BI", 0xDB, len(data)) + data
    if isinstance(value, bytes):
        return struct.pack(">BI", 0xC6, len(value)) + value
    if isinstance(value, Ext):
        return struct.pack(">BIb", 0xC9, len(value.data), value.code) + value.data
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return struct.pack(">BI", 0xDF, len(value)) + b"".join(pack(k) + pack(v) for k, v in value)
    return struct.pack(">BI", 0xDD, len(value)) + b"".join(map(pack, value))


def slice_nd(part):
    return pack([pack([start, stop, None]) for start, stop in part])


def chunk(shape, dtype, data, code=1):
    return Ext(code, pack([list(shape), dtype, data]))


def leaf(shape, dtype, parts, shards):
    return Ext(8, pack([pack([list(shape), dtype, False, {}]), [slice_nd(part) for part in parts], shards]))


def raw(tensor):
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def name(tensor):
    return str(tensor.dtype).removeprefix("torch.")


def cut(tensor, pieces):
    """Returns the parts of a grid with this number of pieces per axis. If the axis does not divide, sizes differ."""
    axes = [[(n * i // k, n * (i + 1) // k) for i in range(k)] for n, k in zip(tensor.shape, pieces)]
    return list(product(*axes))


def content(tree, pieces=None, shard_count=2, chunk_elements=7):
    """Makes the index and the shards, as objects to be packed.

    `tree` holds maps and tensors. `pieces` maps a path to the number of cuts per axis.
    """
    shards, count = [{MARK: True} for _ in range(shard_count)], 0

    def walk(node, path):
        nonlocal count
        if isinstance(node, dict):
            found = {key: walk(node[key], f"{path}/{key}") for key in sorted(node)}
            return dict(reversed(found.items()))  # readers must not depend on the order in the file
        parts = cut(node, (pieces or {}).get(path[1:], (1,) * node.ndim))
        places = [(count + i) % shard_count for i in range(len(parts))]
        for part, place in zip(parts, places):
            flat = node[tuple(slice(*pair) for pair in part)].reshape(-1)
            chunks = [chunk((len(c),), name(node), raw(c)) for c in flat.split(chunk_elements)]
            shards[place].setdefault(str(count), []).append([chunks, Ext(6, slice_nd(part))])
        count += 1
        return leaf(node.shape, name(node), parts, places)

    return {"shard_count": shard_count, "index": walk(tree, ""), "version": "20220622"}, shards


def write(folder, index, shards):
    """Packs and writes the files; returns the prefix."""
    prefix = folder / "checkpoint"
    prefix.with_suffix(".index").write_bytes(pack(index))
    for i, shard in enumerate(shards):
        (folder / f"checkpoint.data-{i:05d}-of-{len(shards):05d}").write_bytes(pack(shard))
    return prefix
