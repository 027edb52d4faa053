"""Shards of WebDataset: tar files whose members are read on demand, at random positions."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vmoe_routers.training.error import DataError
from vmoe_routers.training.pictures import EXTENSIONS, decode_picture
from vmoe_routers.training.samples import Data, Names
from vmoe_routers.training.tar import Member, members, read_at

_KEY = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")  # the key of WebDataset ends at the first dot of the name
_TEST = ("val", "test")
_MOST_CLASSES = 1_000_000


class Shards:
    """Images in tar files. Opening reads the headers of all members. Indexing reads one image.

    Args:
        paths: Uncompressed tar files in WebDataset's format: members such as "0001.jpg" (an image) and "0001.cls" (the
            number of its class, as text).

    Raises:
        DataError: A file is not such a tar file.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths: list[str] = [str(path) for path in paths]
        found = [(number, member, label) for number, path in enumerate(paths) for member, label in _index(path)]
        if not found:
            raise DataError(f"{self.paths[0]}: no images")
        self.shards: NDArray[np.int32] = np.array([number for number, _, _ in found], dtype=np.int32)
        self.places: NDArray[np.int64] = np.array(
            [(member.offset, member.size) for _, member, _ in found], dtype=np.int64
        )
        self.names: Names = Names(member.name for _, member, _ in found)
        self.labels: NDArray[np.int64] = np.array([label for _, _, label in found], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, (offset, size) = self.paths[self.shards[index]], self.places[index].tolist()
        name = f"{path}: {self.names[index]}"
        try:
            with open(path, "rb") as file:
                raw = read_at(file, offset, size)
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error}") from error
        return decode_picture(io.BytesIO(raw), name), int(self.labels[index])


def open_shards(pattern: Path) -> Data:
    """Opens shards such as folder/train-{000..011}.tar for training, with val*.tar or test*.tar of the same folder."""
    names = expand(pattern.name)
    missing = next((name for name in names if not (pattern.parent / name).is_file()), None)
    if missing:
        raise DataError(f"{pattern}: no file {pattern.parent / missing}")
    return _open(pattern.parent, [pattern.parent / name for name in names])


def open_shard_folder(folder: Path) -> Data:
    """Opens a folder with shards train*.tar and val*.tar or test*.tar."""
    return _open(folder, sorted(folder.glob("train*.tar")))


def expand(name: str) -> list[str]:
    """Expands ranges such as {000..011} in a name. Numbers keep their width."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", name)
    if not match:
        return [name]
    first, last = match.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [text for number in numbers for text in expand(name[: match.start()] + number + name[match.end() :])]


def _open(folder: Path, train: list[Path]) -> Data:
    test = next((found for part in _TEST if (found := sorted(folder.glob(f"{part}*.tar")))), [])
    if not train or not test:
        raise DataError(f"{folder}: wanted shards train*.tar and val*.tar (or test*.tar)")
    parts = Shards(train), Shards(test)
    classes = 1 + max(int(part.labels.max()) for part in parts)
    return Data(folder.absolute().name, *parts, tuple(map(str, range(classes))), 3, None)


def _index(path: Path) -> list[tuple[Member, int]]:
    """Lists the images of a tar file with their labels, in the order of the file."""
    images: dict[str, Member] = {}
    labels: dict[str, int] = {}
    try:
        with open(path, "rb") as file:
            for member in members(file):
                match = _KEY.fullmatch(member.name)
                if match and match[2].lower() in EXTENSIONS:
                    images[match[1]] = member
                elif match and match[2].lower() == "cls":
                    labels[match[1]] = _label(read_at(file, member.offset, min(member.size, 20)), member.name)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as an uncompressed tar file: {error}") from error
    alone = min(images.keys() ^ labels.keys(), default=None)
    if alone is not None:
        raise DataError(f"{path}: wanted {alone} with an image and a .cls, got only one of them")
    return [(member, labels[key]) for key, member in images.items()]


def _label(text: bytes, name: str) -> int:
    if not text.strip().isdigit() or int(text) >= _MOST_CLASSES:
        came = text.decode(errors="replace")
        raise ValueError(f"{name}: wanted the number of a class, below {_MOST_CLASSES}, got {came!r}")
    return int(text)
