"""Small image data sets as tensors: digits, IDX files, folders of images."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers.memory import available_memory, in_words
from vmoe_routers.options import OptionError
from vmoe_routers.training.error import DataError

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder


MAX_SIZE = 1 << 31  # largest value of an option that counts pixels or images


@dataclass(frozen=True)
class Images:
    """A classification data set in memory.

    Attributes:
        name: the name in tables and reports.
        train_images, test_images: [N, channels, height, width] float32 in [0, 1], square.
        train_labels, test_labels: [N] int64, in [0, num_classes).
        num_classes: at least 2.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int

    @property
    def size(self) -> int:
        """Height and width of an image, in pixels."""
        return self.train_images.shape[-1]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train_images.shape[1]


def load(data: str, *, image_size: int | None = None, max_images: int | None = None) -> Images:
    """Reads a data set.

    Args:
        data: "digits" (scikit-learn's 1,797 handwritten digits of 8 x 8 pixels), a folder
            with IDX files such as train-images-idx3-ubyte.gz (MNIST, Fashion-MNIST), or a
            folder with train/ and val/ (or test/), each with a folder of images per class.
        image_size: resize to this height and width. None keeps the size; folders of images are resized to 32.
        max_images: keep at most this many training images and this many test images: the first, or in
            folders of images an even selection.

    Raises:
        DataError: the data do not exist or cannot be read.
        OptionError: an option out of range, or images too large for the memory.
    """
    for name, value in (("image_size", image_size), ("max_images", max_images)):
        if value is not None and not 1 <= value <= MAX_SIZE:
            raise OptionError(f"{name} must be at least 1 and at most {MAX_SIZE}, got {value}", name)
    folder = Path(data)
    if data == "digits":
        images = _load_digits()
    elif not folder.is_dir():
        raise DataError(f"no folder {data!r}: --data takes 'digits', a folder with IDX files, or a folder with train/")
    elif (folder / "train").is_dir():
        images = _load_image_folder(folder, image_size or 32, max_images)
    else:
        images = _load_idx_folder(folder)
    if images.num_classes < 2:
        raise DataError(f"{data}: wanted at least 2 classes, got {images.num_classes}")
    if max_images is not None:
        images = replace(
            images,
            train_images=images.train_images[:max_images],
            train_labels=images.train_labels[:max_images],
            test_images=images.test_images[:max_images],
            test_labels=images.test_labels[:max_images],
        )
    return fit(images, image_size or images.size, images.channels)


def fit(images: Images, size: int, channels: int) -> Images:
    """The images at another size and number of channels.

    Raises:
        OptionError: the images do not fit in memory.
    """
    if (images.size, images.channels) != (size, channels):
        _check_memory(len(images.train_labels) + len(images.test_labels), size, channels)
    return replace(
        images,
        train_images=_fit(images.train_images, size, channels),
        test_images=_fit(images.test_images, size, channels),
    )


def _check_memory(count: int, size: int, channels: int) -> None:
    """Refuses images that do not fit in memory as float32."""
    wanted, available = 4 * count * channels * size * size, available_memory()
    if available is not None and wanted > available:
        raise OptionError(
            f"image_size {size}: {count} images of {size} x {size} pixels need at least {in_words(wanted)}, "
            f"{in_words(available)} are available",
            "image_size",
        )


def _fit(x: Tensor, size: int, channels: int) -> Tensor:
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True).clamp(0, 1)
    if x.shape[1] != channels:
        x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    return x.contiguous()


def _load_digits() -> Images:
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(target)
    # scikit-learn sorts the digits by writer. A fixed shuffle mixes the writers.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Images("digits", images[train], labels[train], images[test], labels[test], 10)


def _load_idx_folder(folder: Path) -> Images:
    train_images, train_labels, test_images, test_labels = (
        read_idx(_find_idx(folder, f"{part}-ubyte"))
        for part in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    )
    for images, labels, which in ((train_images, train_labels, "train"), (test_images, test_labels, "t10k")):
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels) or not len(images):
            raise DataError(
                f"{folder}: the {which} files do not fit: images {list(images.shape)}, labels {list(labels.shape)}"
            )
    return Images(
        folder.name,
        train_images.unsqueeze(1).float() / 255,
        train_labels.long(),
        test_images.unsqueeze(1).float() / 255,
        test_labels.long(),
        int(max(train_labels.max(), test_labels.max())) + 1,
    )


def _find_idx(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder}: no {stem} or {stem}.gz, and no train/ folder either")


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


_PIECE = 1 << 20
_MOST_GZIP_SHRINKS = 1032
_AXES_SHOWN = 4


def evenly(size: int, most: int) -> Tensor:
    """At most `most` evenly spaced indices of `size` examples, which cover all classes of examples sorted by class."""
    return torch.linspace(0, size - 1, min(size, most)).long()


def _load_image(images: ImageFolder, index: int) -> Tensor:
    try:
        return images[index][0]
    except (MemoryError, RuntimeError) as error:
        raise DataError(f"{images.samples[index][0]}: cannot be resized: {error or 'not enough memory'}") from error


def _load_image_folder(folder: Path, size: int, max_images: int | None) -> Images:
    try:
        from torchvision.datasets import ImageFolder
        from torchvision.transforms import v2

        from vmoe_routers.training.pictures import read_picture
    except (ImportError, RuntimeError, AttributeError) as error:
        # A torchvision that does not fit torch raises RuntimeError or AttributeError on import.
        raise DataError(
            f"folders of images need a torchvision that fits this torch: pip install torchvision ({error})"
        ) from error
    test_folder = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if test_folder is None:
        raise DataError(f"{folder}: has train/ but neither val/ nor test/")
    to_tensor = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    parts = []
    for part in (folder / "train", test_folder):
        try:
            found = ImageFolder(str(part), transform=to_tensor, loader=read_picture)
        except FileNotFoundError as error:
            raise DataError(f"{part}: wanted a folder of images for every class: {error}") from error
        _check_memory(min(len(found), max_images or len(found)), size, 3)
        chosen = evenly(len(found), max_images or len(found)).tolist()
        images = torch.stack([_load_image(found, i) for i in chosen])
        parts.append((images, torch.tensor(found.targets)[chosen], found.classes))
    (train_images, train_labels, classes), (test_images, test_labels, test_classes) = parts
    if classes != test_classes:
        raise DataError(
            f"{folder}: train/ and {test_folder.name}/ must have the same classes, "
            f"only in one of them: {', '.join(sorted({*classes} ^ {*test_classes})[:5])}"
        )
    return Images(folder.name, train_images, train_labels, test_images, test_labels, len(classes))
