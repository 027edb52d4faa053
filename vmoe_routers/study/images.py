"""Images of a study: in memory, or read from disk at every use."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe_routers.study.settings import Settings
from vmoe_routers.training import Images, load
from vmoe_routers.training.data import DEFAULT_SIZE, evenly, fit
from vmoe_routers.training.loader import Batches, evaluation_batches, training_batches
from vmoe_routers.training.probes import labels_of, part_of
from vmoe_routers.training.samples import Samples
from vmoe_routers.training.sources import open_data
from vmoe_routers.training.transforms import Transform


@dataclass(frozen=True)
class Streamed:
    """Classification data set whose images are read from disk at every use.

    Attributes:
        name: the name in tables and reports.
        train, test: the images.
        train_labels, test_labels: [N] int64.
        num_classes: at least 2.
        size: height and width to which images are resized.
        channels: 1 for grey, 3 for colour.
        is_default_size: whether images differ in size and no size was given.
    """

    name: str
    train: Samples
    test: Samples
    train_labels: Tensor
    test_labels: Tensor
    num_classes: int
    size: int
    channels: int
    is_default_size: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the images in memory."""
        return 0


StudyData = Images | Streamed


def load_images(settings: Settings) -> tuple[StudyData, Images | None]:
    """Reads the data, and the second data set in the size of the first one.

    Raises:
        DataError: The data do not exist or cannot be read.
        OptionError: An option out of range, or images too large for the memory.
    """
    if settings.stream:
        data: StudyData = _stream(settings)
    else:
        data = load(settings.data, image_size=settings.image_size, max_images=settings.max_images)
    if settings.transfer_data is None:
        return data, None
    transfer = load(settings.transfer_data, image_size=data.size, max_images=settings.max_images)
    return data, fit(transfer, data.size, data.channels)


def _stream(settings: Settings) -> Streamed:
    found = open_data(settings.data)
    parts = []
    for samples in (found.train, found.test):
        if settings.max_images is not None and settings.max_images < len(samples):
            samples = part_of(samples, evenly(len(samples), settings.max_images))
        parts.append(samples)
    train, test = parts
    return Streamed(
        found.name,
        train,
        test,
        labels_of(train),
        labels_of(test),
        found.num_classes,
        settings.image_size or found.size or DEFAULT_SIZE,
        found.channels,
        is_default_size=settings.image_size is None and found.size is None,
    )


def split(data: StudyData, holdout: int) -> tuple[Samples, Samples]:
    """Splits the data: images to train on, and images on which curves are measured.

    The held-out images are the last ones, or evenly spaced ones where the images are sorted by class. Without held-out
    images, curves are measured on the test images.
    """
    if not holdout:
        return data.train, data.test
    labels, everything = data.train_labels, torch.arange(len(data.train_labels))
    is_sorted = bool((labels[1:] >= labels[:-1]).all())
    held_out = evenly(len(labels), holdout) if is_sorted else everything[-holdout:]
    is_kept = torch.ones(len(labels), dtype=torch.bool)
    is_kept[held_out] = False
    return part_of(data.train, everything[is_kept]), part_of(data.train, held_out)


def batches_of_training(settings: Settings, data: StudyData, train: Samples, seed: int, steps: int) -> Batches:
    """Makes the batches of a run. Order and augmentation depend on the seed and are the same for all variants."""
    return training_batches(
        train,
        Transform(settings.augmentation(data.size), data.channels, training=True),
        batch_size=settings.batch_size,
        steps=steps,
        seed=seed,
        workers=settings.data_workers,
        device=settings.device,
    )


def batches_of_evaluation(settings: Settings, data: StudyData, samples: Samples, batch_size: int) -> Batches:
    """Makes batches of all images in order, without augmentation."""
    return evaluation_batches(
        samples,
        Transform(settings.augmentation(data.size), data.channels, training=False),
        batch_size=batch_size,
        workers=settings.data_workers,
        device=settings.device,
    )


def first_images(settings: Settings, data: StudyData, count: int) -> tuple[Tensor, Tensor]:
    """Returns the first training images and their labels, without augmentation, on the device of the settings."""
    samples = part_of(data.train, torch.arange(count))
    with batches_of_evaluation(settings, data, samples, count) as batches:
        images, labels, _ = next(batches)
    return images, labels
