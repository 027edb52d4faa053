"""Data sets: digits, IDX files, folders of images, and one-line errors for unreadable files."""

import gzip
import os
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from made import PIXELS, TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, idx, idx_folder
from PIL import Image

from vmoe_routers.options import OptionError
from vmoe_routers.training import DataError, load
from vmoe_routers.training.data import fit
from vmoe_routers.training.idx import read_idx


def image_folder(folder, parts=("train", "val"), classes=("ant", "bee"), mode="RGB"):
    rng = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for i in range(3):
                shape = (6, 8) if mode == "L" else (6, 8, 3)
                Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(folder / part / name / f"{i}.png")
    return folder


def refused(data, words, **options):
    with pytest.raises(DataError, match=words) as caught:
        load(str(data), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(6, 5, 4), (7,), (0, 3, 3)])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_read_idx(tmp_path, shape, suffix):
    wanted = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    path = tmp_path / f"file{suffix}"
    path.write_bytes(gzip.compress(idx(wanted)) if suffix else idx(wanted))
    found = read_idx(path)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), wanted)


def damaged(raw):
    """Returns the bytes with the middle of the compressed data overwritten."""
    return raw[:20] + b"\xff" * 30 + raw[50:]


@pytest.mark.parametrize(("name", "raw", "words"), [
    ("truncated", idx(PIXELS)[:-1], r"its header says \[6, 5, 4\], but 119 bytes follow"),
    ("longer", idx(PIXELS) + b"\0", "but more than 120 bytes follow"),
    ("only the header's beginning", idx(PIXELS)[:9], "but 0 bytes follow"),
    ("an overflowing header", b"\0\0\x08\x04" + b"\xff" * 16, "but 0 bytes follow"),
    ("255 axes", b"\0\0\x08\xff" + b"\1" * 1020, r"says \[16843009, 16843009, 16843009, 16843009, \.\.\.\], but 0"),
    ("no axes", b"\0\0\x08\0", "header says"),
    ("floats", b"\0\0\x0d" + idx(PIXELS)[3:], "not an IDX file of bytes .it begins with 00000d03"),
    ("text", b"<html>", "not an IDX file"),
    ("empty", b"", "nothing"),
    ("plain.gz", idx(PIXELS), "cannot be read"),
    ("truncated.gz", gzip.compress(idx(PIXELS))[:-20], "cannot be read"),
    ("corrupted.gz", damaged(gzip.compress(idx(PIXELS))), "cannot be read"),
    ("checksum.gz", gzip.compress(idx(PIXELS))[:-8] + b"\0" * 8, "cannot be read"),
    ("truncated inside.gz", gzip.compress(idx(PIXELS)[:-1]), "119 bytes follow"),
])  # fmt: skip
def test_read_idx_refuses(tmp_path, name, raw, words):
    path = tmp_path / name
    path.write_bytes(raw)
    with pytest.raises(DataError, match=words) as caught:
        read_idx(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_read_idx_needs_no_more_memory_than_the_header_says(tmp_path):
    """One file has 64 MB of zeros after a header of six pixels. The other has a header of 4 GB before six pixels."""
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(idx(np.zeros(6)) + bytes(64_000_000)))
    (tmp_path / "liar.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\xff\xff\xff\xff" + bytes(6)))
    tracemalloc.start()
    try:
        for name, words in (("bomb", "more than 6 bytes follow"), ("liar", "but 6 bytes follow")):
            with pytest.raises(DataError, match=words):
                read_idx(tmp_path / f"{name}.gz")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_read_idx_larger_than_the_memory(tmp_path, monkeypatch):
    (tmp_path / "large").write_bytes(idx(PIXELS))
    monkeypatch.setattr("vmoe_routers.training.idx.available_memory", lambda: 100)
    with pytest.raises(DataError, match="120 bytes of pixels, 100 bytes of memory are available"):
        read_idx(tmp_path / "large")


@pytest.mark.parametrize("path", ["pipe", "pipe.gz", "folder", "nowhere"])
def test_read_idx_opens_regular_files_only(tmp_path, path):
    (tmp_path / "folder").mkdir()
    if path.startswith("pipe"):
        os.mkfifo(tmp_path / path)
    with pytest.raises(DataError, match=f"{path}: not a regular file"):
        read_idx(tmp_path / path)


@pytest.mark.parametrize("options", [{"image_size": 0}, {"image_size": 1_000_000}, {"image_size": 10**30},
                                     {"max_images": 0}, {"max_images": 10**30}])  # fmt: skip
def test_options_out_of_range(options):
    ((name, value),) = options.items()
    with pytest.raises(OptionError, match=f"^{name} .*{value}") as error:
        load("digits", **options)
    assert error.value.options == (name,)


def test_images_larger_than_the_memory_are_refused_before_they_are_read(tmp_path):
    with pytest.raises(OptionError, match=r"image_size 1000000: 6 images .* need at least 65.5 TiB, .* are available"):
        load(str(image_folder(tmp_path)), image_size=1_000_000)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folder(tmp_path, zipped):
    idx_folder(tmp_path)
    if zipped:
        for path in list(tmp_path.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    found = load(str(tmp_path), image_size=4)
    assert (found.name, found.num_classes, found.size, found.channels) == (tmp_path.name, 4, 4, 1)
    assert found.train_images.shape == (6, 1, 4, 4) and found.test_images.shape == (2, 1, 4, 4)
    assert found.train_labels.tolist() == [0, 1, 2, 2, 1, 0] and found.train_labels.dtype == torch.int64
    assert found.test_labels.tolist() == [3, 0]


def test_idx_pixels_are_shares(tmp_path):
    square = PIXELS[:, :4]
    found = load(str(idx_folder(tmp_path, **{TRAIN: idx(square), TEST: idx(square[:2])})), max_images=3)
    torch.testing.assert_close(found.train_images, torch.tensor(square[:3]).unsqueeze(1) / 255)
    assert len(found.train_labels) == 3 and len(found.test_labels) == 2


@pytest.mark.parametrize(("files", "words"), [
    ({TRAIN_LABELS: idx([0, 1])}, r"the train files do not fit: images \[6, 5, 4\], labels \[2\]"),
    ({TEST_LABELS: idx([0, 1, 1])}, "the t10k files do not fit"),
    ({TEST: idx(PIXELS[:, 0])}, "the t10k files do not fit"),
    ({TEST: idx(PIXELS[:0]), TEST_LABELS: idx([])}, "the t10k files do not fit"),
    ({TRAIN_LABELS: idx([0] * 6), TEST_LABELS: idx([0, 0])}, "wanted at least 2 classes, got 1"),
    ({TEST_LABELS: None}, f"no {TEST_LABELS} or {TEST_LABELS}.gz"),
    (dict.fromkeys([TRAIN, TRAIN_LABELS, TEST, TEST_LABELS]), "no train-images.*, and no train/ folder either"),
])  # fmt: skip
def test_idx_folder_refuses(tmp_path, files, words):
    refused(idx_folder(tmp_path, **files), words)


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "no folder '.*nowhere': --data takes")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("test_part", ["val", "test"])
def test_image_folder(tmp_path, test_part, mode):
    found = load(str(image_folder(tmp_path, ("train", test_part), mode=mode)), image_size=4)
    assert found.train_images.shape == (6, 3, 4, 4) and found.test_images.shape == (6, 3, 4, 4)
    assert found.train_labels.tolist() == found.test_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.num_classes == 2 and found.train_images.dtype == torch.float32
    assert 0 <= found.train_images.min() < 0.5 < found.train_images.max() <= 1
    assert not found.is_default_size
    unasked = load(str(tmp_path))
    assert unasked.size == 32 and unasked.is_default_size


def test_image_folder_takes_fewer_from_every_class(tmp_path):
    found = load(str(image_folder(tmp_path)), max_images=4)
    assert found.train_labels.tolist() == [0, 0, 1, 1]


def test_image_folder_reads_every_format(tmp_path):
    """torchvision alone leaves out GIF files."""
    folder = image_folder(tmp_path)
    for part in ("train", "val"):
        for path in (folder / part).glob("*/0.png"):
            Image.open(path).convert("L").save(path.with_suffix(".GIF"))
            path.unlink()
    assert len(load(str(folder)).train_labels) == 6


def test_image_folder_refuses(tmp_path):
    folder = image_folder(tmp_path, ("train",))
    refused(folder, "has train/ but neither val/ nor test/")
    image_folder(folder, ("val",), ("ant", "wasp"))
    refused(folder, "the same classes, only in one of them: bee, wasp")
    (folder / "val" / "wasp").rename(folder / "val" / "bee")
    (folder / "val" / "ant" / "0.png").write_bytes(b"no picture")
    refused(folder, r"val/ant/0\.png: cannot be read: cannot identify image file")
    (folder / "val" / "ant" / "0.png").write_bytes((folder / "val" / "ant" / "1.png").read_bytes()[:40])
    refused(folder, r"val/ant/0\.png: cannot be read: ")
    (folder / "val" / "empty").mkdir()
    refused(folder, r"wanted a folder for every class, with images .*gif.*empty\. Remove folders without images")


def test_image_folder_of_one_class(tmp_path):
    refused(image_folder(tmp_path, classes=("ant",)), "wanted at least 2 classes, got 1")


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), ImportError("none here")])
def test_torchvision_that_does_not_fit(tmp_path, monkeypatch, error):
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name.startswith("torchvision"):
                raise error

    for name in [name for name in sys.modules if name.startswith("torchvision")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    refused(image_folder(tmp_path), f"need a torchvision that fits this torch: pip install torchvision .{error}")


def test_digits_split_is_fixed_and_disjoint():
    from sklearn.datasets import load_digits

    found = load("digits")
    assert found.train_images.shape == (1437, 1, 8, 8) and found.test_images.shape == (360, 1, 8, 8)
    assert found.num_classes == 10
    # This order must never change, so that results of different versions and machines can be compared.
    assert found.test_labels[:12].tolist() == [2, 4, 8, 4, 9, 6, 8, 7, 7, 2, 1, 4]
    torch.manual_seed(1)
    again = load("digits")
    assert torch.equal(found.train_images, again.train_images) and torch.equal(found.test_labels, again.test_labels)
    images = torch.cat([found.train_images, found.test_images]).flatten(1)
    rows = torch.cat([images * 16, torch.cat([found.train_labels, found.test_labels]).unsqueeze(1)], dim=1)
    pixels, target = load_digits(return_X_y=True)
    original = np.concatenate([pixels, target[:, None]], axis=1)
    # Every digit is in exactly one of the two parts.
    assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, original.tolist()))


def test_digits_options():
    assert not load("digits").is_default_size
    found = load("digits", image_size=4, max_images=50)
    assert found.train_images.shape == (50, 1, 4, 4) and found.test_images.shape == (50, 1, 4, 4)
    assert torch.equal(found.train_labels, load("digits").train_labels[:50])


def test_fit():
    digits = load("digits", max_images=10)
    colour = fit(digits, 8, 3)
    assert colour.channels == 3
    for channel in range(3):
        assert torch.equal(colour.test_images[:, channel], digits.test_images[:, 0])
    torch.testing.assert_close(fit(colour, 8, 1).train_images, digits.train_images)
    large = fit(digits, 14, 1)
    assert large.size == 14 and large.test_images.shape == (10, 1, 14, 14)
    assert large.train_images.min() >= 0 and large.train_images.max() <= 1
    # A flat image stays flat.
    flat = fit(digits.__class__(**{**vars(digits), "train_images": torch.full((2, 1, 8, 8), 0.25)}), 5, 1)
    torch.testing.assert_close(flat.train_images, torch.full((2, 1, 5, 5), 0.25))
