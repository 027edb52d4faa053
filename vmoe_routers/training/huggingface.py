"""Data sets of Hugging Face's `datasets`, read from their Arrow files on demand."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from vmoe_routers.training.error import DataError
from vmoe_routers.training.pictures import decode_picture, read_picture
from vmoe_routers.training.samples import Data


class Rows:
    """Rows of a table with an image and a label.

    Args:
        table: a `datasets.Dataset` whose column `image` is not decoded.
        image, label: names of the columns.
        name: the name in errors.
    """

    def __init__(self, table: Any, image: str, label: str, name: str):
        self.table: Any = table
        self.image: str = image
        self.label: str = label
        self.name: str = name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.table[index]
        image, label = row[self.image], row[self.label]
        if image is None or label is None or label < 0:  # -1 means an unknown label
            raise DataError(f"{self.name}, row {index}: has no {self.image if image is None else self.label}")
        if image["bytes"] is None:
            return read_picture(image["path"]), label
        name = f"{self.name}, row {index}" + (f" ({image['path']})" if image["path"] else "")
        return decode_picture(io.BytesIO(image["bytes"]), name), label


def open_name(name: str) -> Data:
    """Opens the data set `name` or `name:configuration` of Hugging Face. Downloads it if it is not in the cache.

    Raises:
        DataError: the package `datasets` is missing, there is no such data set, or it has no images and labels.
    """
    repository, _, configuration = name.partition(":")
    if not repository:
        raise DataError(f"hf:{name}: wanted the name of a data set, such as hf:cifar10")
    datasets = _import()
    try:
        found = datasets.load_dataset(repository, configuration or None)
    except Exception as error:  # errors have many types: connection, no such data set, no such configuration
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"hf:{name}: cannot be loaded: {reason}") from error
    return _open(found, f"hf:{name}", repository.rpartition("/")[2])


def open_folder(folder: Path) -> Data:
    """Opens a data set that `DatasetDict.save_to_disk` wrote to a folder.

    Raises:
        DataError: the package `datasets` is missing, the folder is damaged, or it has no images and labels.
    """
    datasets = _import()
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # a missing file, damaged JSON, damaged Arrow
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{folder}: cannot be loaded: {reason}") from error
    return _open(found, str(folder), folder.name)


def _import() -> Any:
    try:
        import datasets  # pyright: ignore[reportMissingImports]  # optional
    except ImportError as error:
        raise DataError(
            f"data sets of Hugging Face need the package datasets: pip install datasets ({error})"
        ) from error
    return datasets


def _open(found: Any, source: str, name: str) -> Data:
    # The test split of some data sets has no labels, so validation comes first.
    test_split = next((split for split in ("validation", "val", "valid", "test") if split in found), None)
    if "train" not in found or test_split is None:
        raise DataError(f"{source}: wanted the splits train and validation or test, got {', '.join(map(str, found))}")
    features = found["train"].features
    image = next((key for key, feature in features.items() if type(feature).__name__ == "Image"), None)
    label = next((key for key, feature in features.items() if type(feature).__name__ == "ClassLabel"), None)
    if image is None or label is None:
        columns = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        raise DataError(f"{source}: wanted a column of type Image and one of type ClassLabel, got {columns}")
    if found[test_split].features != features:
        raise DataError(f"{source}: the splits train and {test_split} have different columns or classes")

    def rows(split: str) -> Rows:
        table = found[split].select_columns([image, label]).cast_column(image, _import().Image(decode=False))
        return Rows(table, image, label, f"{source} {split}")

    return Data(name, rows("train"), rows(test_split), tuple(features[label].names), 3, None)
