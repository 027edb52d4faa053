"""Data sets of torchvision by name."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from vmoe_routers.training.error import DataError
from vmoe_routers.training.samples import Data, Tensors

# Arguments of the images for training and of the images for evaluation.
_TRAIN, _TEST = {"train": True}, {"train": False}
SMALL_SETS = ("MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100", "SVHN")
"""Data sets with images of at most 32 pixels."""
_SETS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST", "USPS", "CIFAR10", "CIFAR100"), (_TRAIN, _TEST)),
    **dict.fromkeys(("SVHN", "STL10", "Food101", "DTD", "Country211"), ({"split": "train"}, {"split": "test"})),
    **dict.fromkeys(("FGVCAircraft", "OxfordIIITPet"), ({"split": "trainval"}, {"split": "test"})),
    **dict.fromkeys(("StanfordCars", "Flowers102"), ({"split": "train"}, {"split": "test"})),
    **dict.fromkeys(("ImageNet", "Imagenette"), ({"split": "train"}, {"split": "val"})),
}


class _Files:
    """Data set of torchvision that reads files. Its errors name the image."""

    def __init__(self, samples: Any, name: str):
        self.samples, self.name = samples, name

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            return self.samples[index]
        except Exception as error:  # a damaged file makes Pillow's decoders raise errors of nearly every type
            raise DataError(f"{self.name}, image {index}: cannot be read: {error or type(error).__name__}") from error


def open_torchvision(name: str, data_root: str | Path | None) -> Data:
    """Opens the data set `name` of torchvision. Downloads it into `data_root` if it is missing.

    Raises:
        DataError: torchvision has no such data set, or it cannot be downloaded.
    """
    from vmoe_routers.training.sources import import_torchvision

    if name not in _SETS:
        raise DataError(f"torchvision:{name}: wanted one of {', '.join(sorted(_SETS))}")
    kind = getattr(import_torchvision().datasets, name)
    root = Path(data_root) if data_root is not None else Path(torch.hub.get_dir()).parent / "datasets"
    train, test = (_open(kind, name, root, arguments) for arguments in _SETS[name])
    classes = getattr(train, "classes", None)
    train_images, test_images = _tensors(train), _tensors(test)
    if train_images is None or test_images is None:
        train, test = _Files(train, f"torchvision:{name} train"), _Files(test, f"torchvision:{name} test")
        return Data(name, train, test, _names(classes), 3, None)
    if classes is None:
        classes = range(1 + int(max(train_images.labels.max(), test_images.labels.max())))
    _, channels, _, size = train_images.images.shape
    return Data(name, train_images, test_images, _names(classes), channels, size)


def _open(kind: Any, name: str, root: Path, arguments: dict[str, Any]) -> Any:
    if "download" in inspect.signature(kind).parameters:
        arguments = {**arguments, "download": True}
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):  # one process downloads; other processes wait and find the files
            return kind(root, **arguments)
    except Exception as error:  # torchvision raises RuntimeError, URLError and more
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"torchvision:{name}: not in {root}, and cannot be downloaded: {reason}") from error


def _names(classes: Any) -> tuple[str, ...]:
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in classes)


def _tensors(samples: Any) -> Tensors | None:
    """Returns the images of a data set that is in memory, or None if it reads files."""
    images = getattr(samples, "data", None)
    labels = getattr(samples, "targets", getattr(samples, "labels", None))
    if not isinstance(images, np.ndarray | torch.Tensor) or labels is None:
        return None
    images = torch.as_tensor(images)
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2)
    return Tensors(images.contiguous(), torch.as_tensor(np.asarray(labels)).long())
