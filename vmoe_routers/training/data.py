"""Small image data sets as tensors, for the study."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers.memory import available_memory, in_words
from vmoe_routers.options import OptionError
from vmoe_routers.training.error import DataError
from vmoe_routers.training.samples import Samples, Tensors
from vmoe_routers.training.sources import import_torchvision, open_data

MAX_SIZE = 1 << 31  # largest value of an option that counts pixels or images
DEFAULT_SIZE = 32  # size to which images of different sizes are resized


@dataclass(frozen=True)
class Images:
    """Classification data set in memory.

    Attributes:
        name: the name in tables and reports.
        train_images, test_images: [N, channels, height, width] float32 in [0, 1], square.
        train_labels, test_labels: [N] int64, in [0, num_classes).
        num_classes: at least 2.
        is_default_size: whether images of different sizes were resized to `DEFAULT_SIZE`, because no size was given.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    is_default_size: bool = False

    @property
    def train(self) -> Tensors:
        """Training images with their labels."""
        return Tensors(self.train_images, self.train_labels)

    @property
    def test(self) -> Tensors:
        """Test images with their labels."""
        return Tensors(self.test_images, self.test_labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the images in memory."""
        return self.train_images.nbytes + self.test_images.nbytes

    @property
    def size(self) -> int:
        """Height and width of an image, in pixels."""
        return self.train_images.shape[-1]

    @property
    def channels(self) -> int:
        """1 for grey, 3 for colour."""
        return self.train_images.shape[1]


def load(
    data: str,
    *,
    image_size: int | None = None,
    max_images: int | None = None,
    data_root: str | Path | None = None,
) -> Images:
    """Reads a data set into memory.

    Args:
        data: the name or folder, as `open_data` takes it.
        image_size: resize to this height and width. None keeps the size. Images in files are resized to 32.
        max_images: keep at most this many training images and this many test images. Data in files keep evenly spaced
            images, all other data their first images.
        data_root: the folder for downloads of torchvision.

    Raises:
        DataError: the data do not exist or cannot be read.
        OptionError: an option out of range, or images too large for the memory.
    """
    for name, value in (("image_size", image_size), ("max_images", max_images)):
        if value is not None and not 1 <= value <= MAX_SIZE:
            raise OptionError(f"{name} must be at least 1 and at most {MAX_SIZE}, got {value}", name)
    found = open_data(data, data_root=data_root)
    size = image_size or found.size or DEFAULT_SIZE
    (train_images, train_labels), (test_images, test_labels) = (
        _read(part, name, size, found.channels, max_images or len(part))
        for part, name in ((found.train, f"{data} train"), (found.test, f"{data} test"))
    )
    images = Images(
        found.name,
        train_images,
        train_labels,
        test_images,
        test_labels,
        found.num_classes,
        is_default_size=image_size is None and found.size is None,
    )
    return fit(images, size, found.channels)


def fit(images: Images, size: int, channels: int) -> Images:
    """Converts the images to another size and number of channels.

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


def evenly(size: int, most: int) -> Tensor:
    """Returns at most `most` evenly spaced indices of `size` examples. They cover all classes of sorted examples."""
    return torch.linspace(0, size - 1, min(size, most)).long()


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


def _read(samples: Samples, name: str, size: int, channels: int, most: int) -> tuple[Tensor, Tensor]:
    if isinstance(samples, Tensors):
        images, labels = samples.images[:most], samples.labels[:most]
        return images.float() / 255 if images.dtype == torch.uint8 else images, labels
    _check_memory(min(len(samples), most), size, channels)
    v2 = import_torchvision().transforms.v2
    to_tensor = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    images, labels = [], []
    for index in evenly(len(samples), most).tolist():
        image, label = samples[index]
        try:
            images.append(to_tensor(image))
        except (MemoryError, RuntimeError) as error:
            raise DataError(f"{name}, image {index}: cannot be resized: {error or 'not enough memory'}") from error
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)
