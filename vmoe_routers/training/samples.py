"""Map-style data sets: an index gives an image and its label."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vmoe_routers.training.pictures import read_picture


class Samples(Protocol):
    """Map-style data set, as torch's DataLoader takes it.

    An item is an image and its label. The image is a PIL image or a tensor [channels, height, width] (uint8, or float32
    in [0, 1]). An unreadable image raises a DataError that names it.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


@dataclass(frozen=True)
class Data:
    """Classification data set.

    Attributes:
        name: the name in tables and reports.
        train, test: the images for training and for evaluation, with their labels in [0, num_classes).
        classes: the names of the classes.
        channels: 1 for grey, 3 for colour.
        size: height and width of the images in pixels, or None if images differ in size.
    """

    name: str
    train: Samples
    test: Samples
    classes: tuple[str, ...]
    channels: int
    size: int | None

    @property
    def num_classes(self) -> int:
        """Number of classes, at least 2."""
        return len(self.classes)


@dataclass(frozen=True)
class Tensors:
    """Images in memory, which the loader augments in whole batches.

    Attributes:
        images: [N, channels, height, width], uint8 or float32 in [0, 1].
        labels: [N] int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


class Names:
    """Names in two arrays. A list of strings would be copied into every worker, because reading changes refcounts.

    Args:
        names: names or paths, stored in the encoding of the system.
    """

    def __init__(self, names: Iterable[str | Path]):
        encoded = [os.fsencode(name) for name in names]
        self.text: NDArray[np.uint8] = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self.ends: NDArray[np.int64] = np.cumsum([0, *map(len, encoded)])

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.text[self.ends[index] : self.ends[index + 1]].tobytes())


class Pictures:
    """Image files, read as RGB.

    Args:
        paths: the files.
        labels: the label of every file.
    """

    def __init__(self, paths: Sequence[str | Path], labels: Sequence[int]):
        self.paths: Names = Names(paths)
        self.labels: NDArray[np.int64] = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_picture(self.paths[index]), int(self.labels[index])
