"""Small data sets that tests write."""

import io
import struct
import tarfile

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee")
TRAIN, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 5, 4), dtype=np.uint8)


def idx(array):
    array = np.asarray(array, dtype=np.uint8)
    return b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def idx_folder(folder, **files):
    """Makes a valid folder with IDX files. `files` replaces some of them (None: left out)."""
    contents = {
        TRAIN: idx(PIXELS),
        TRAIN_LABELS: idx([0, 1, 2, 2, 1, 0]),
        TEST: idx(PIXELS[:2]),
        TEST_LABELS: idx([3, 0]),
    }
    for name, content in {**contents, **files}.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


def picture(number, size=(12, 10)):
    """Makes a picture whose first pixel is its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:4, :4] = (number, 255 - number, 7)
    return Image.fromarray(pixels)


def raw_picture(number, size=(12, 10)):
    file = io.BytesIO()
    picture(number, size).save(file, "PNG")
    return file.getvalue()


def picture_folder(folder, count=6, test_count=3):
    """Makes pictures 0, 1, ... for training and 100, 101, ... for evaluation. Each class has half of the pictures."""
    for part, number, first in (("train", count, 0), ("val", test_count, 100)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
        for i in range(number):
            path = folder / part / CLASSES[i * len(CLASSES) // number] / f"{first + i:03}.png"
            path.write_bytes(raw_picture(first + i))
    return folder


def write_shard(path, members):
    """Makes a tar file with members (name, bytes)."""
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))


def shard_folder(folder, shards=3, count=2, test_count=3):
    """Makes shards of `count` pictures: 0, 1, ... for training, and one shard with 100, 101, ... for evaluation."""
    folder.mkdir(exist_ok=True)

    def members(numbers):
        for number in numbers:
            yield f"{number:03}.png", raw_picture(number)
            yield f"{number:03}.cls", str(number % 2).encode()

    for shard in range(shards):
        numbers = range(shard * count, (shard + 1) * count)
        write_shard(folder / f"train-{shard:03}.tar", members(numbers))
    write_shard(folder / "val-0.tar", members(range(100, 100 + test_count)))
    return folder
