"""Opens a data set by its name or folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from vmoe_routers.training.error import DataError
from vmoe_routers.training.idx import open_idx_folder
from vmoe_routers.training.pictures import EXTENSIONS
from vmoe_routers.training.samples import Data, Pictures, Tensors

_WANTED = (
    "'digits', 'torchvision:NAME', 'hf:NAME', shards such as 'train-{000..011}.tar', or a folder with IDX files, "
    "train/ and val/, shards, or a data set of Hugging Face"
)


def open_data(data: str, *, data_root: str | Path | None = None) -> Data:
    """Opens a data set. Images in files are read on demand.

    Args:
        data: One of
            - "digits", scikit-learn's 1,797 handwritten digits of 8 x 8 pixels
            - "torchvision:NAME", such as "torchvision:CIFAR100", which is downloaded if it is not in `data_root`
            - "hf:NAME", a data set of Hugging Face
            - shards of WebDataset such as "folder/train-{000..011}.tar", with val*.tar or test*.tar in the same folder
            - a folder with IDX files such as train-images-idx3-ubyte.gz (MNIST, Fashion-MNIST)
            - a folder with train/ and val/ (or test/), which have a folder of images for every class
            - a folder with shards train*.tar and val*.tar (or test*.tar)
            - a folder written by `save_to_disk` of Hugging Face's datasets.
        data_root: the folder for downloads of torchvision. Default: ~/.cache/torch/datasets.

    Raises:
        DataError: the data do not exist, cannot be read, or have fewer than 2 classes.
    """
    found = _open(data, data_root)
    if found.num_classes < 2:
        raise DataError(f"{data}: wanted at least 2 classes, got {found.num_classes}")
    return found


def _open(data: str, data_root: str | Path | None) -> Data:
    kind, _, name = data.partition(":")
    if data == "digits":
        return _open_digits()
    if kind == "torchvision":
        from vmoe_routers.training.torchvision_data import open_torchvision

        return open_torchvision(name, data_root)
    if kind == "hf":
        from vmoe_routers.training.huggingface import open_name

        return open_name(name)
    folder = Path(data)
    if data.endswith(".tar"):
        from vmoe_routers.training.shards import open_shards

        return open_shards(folder)
    if not folder.is_dir():
        raise DataError(f"no folder {data!r}: --data takes {_WANTED}")
    if (folder / "train").is_dir():
        if (folder / "dataset_dict.json").is_file():
            from vmoe_routers.training.huggingface import open_folder

            return open_folder(folder)
        return _open_image_folder(folder)
    if any(folder.glob("*.tar")):
        from vmoe_routers.training.shards import open_shard_folder

        return open_shard_folder(folder)
    return open_idx_folder(folder)


def _open_digits() -> Data:
    from sklearn.datasets import load_digits

    pixels, target = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(target)
    # scikit-learn sorts the digits by writer. A fixed shuffle mixes the writers.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = (Tensors(images[part], labels[part]) for part in (order[:1437], order[1437:]))
    return Data("digits", train, test, tuple(map(str, range(10))), 1, 8)


def import_torchvision() -> Any:
    """Imports torchvision.

    Raises:
        DataError: It cannot be imported. The message says how to install it.
    """
    try:
        import torchvision
        import torchvision.datasets
        import torchvision.transforms.v2
    except (ImportError, RuntimeError, AttributeError) as error:
        # A torchvision built for another torch raises RuntimeError or AttributeError on import.
        raise DataError(
            f"folders of images need a torchvision that fits this torch: pip install torchvision ({error})"
        ) from error
    return torchvision


def _is_image(path: str) -> bool:
    return path.rpartition(".")[2].lower() in EXTENSIONS


def _open_image_folder(folder: Path) -> Data:
    torchvision = import_torchvision()
    test_folder = next((folder / name for name in ("val", "test") if (folder / name).is_dir()), None)
    if test_folder is None:
        raise DataError(f"{folder}: has train/ but neither val/ nor test/; move some images of every class to val/")
    parts = []
    for part in (folder / "train", test_folder):
        try:
            found = torchvision.datasets.ImageFolder(str(part), is_valid_file=_is_image)
        except FileNotFoundError as error:
            raise DataError(
                f"{part}: wanted a folder for every class, with images ({', '.join(EXTENSIONS)}): "
                f"{str(error).strip()} Remove folders without images"
            ) from error
        parts.append((Pictures([path for path, _ in found.samples], found.targets), found.classes))
    (train, classes), (test, test_classes) = parts
    if classes != test_classes:
        raise DataError(
            f"{folder}: train/ and {test_folder.name}/ must have the same classes, "
            f"only in one of them: {', '.join(sorted({*classes} ^ {*test_classes})[:5])}"
        )
    return Data(folder.name, train, test, tuple(classes), 3, None)
