"""Data sets by name and folder: the image and label of an index, and one-line errors."""

import gzip
import pickle

import numpy as np
import pytest
import torch
from made import (
    TEST,
    TEST_LABELS,
    TRAIN,
    TRAIN_LABELS,
    idx,
    idx_folder,
    picture,
    picture_folder,
    raw_picture,
    shard_folder,
    write_shard,
)

from vmoe_routers.training import Augmentation, DataError, Transform, open_data, training_batches
from vmoe_routers.training.shards import expand


def refused(data, words, **options):
    with pytest.raises(DataError, match=words) as caught:
        open_data(str(data), **options)
    assert "\n" not in str(caught.value)


def check_pictures(data, classes=("0", "1"), name=None):
    """Every source gives pictures 0 to 5 for training and 100 to 102 for evaluation, also after pickling."""
    assert (data.classes, data.num_classes, data.channels, data.size) == (classes, 2, 3, None)
    assert name is None or data.name == name
    for samples, first, count in ((data.train, 0, 6), (data.test, 100, 3)):
        assert len(samples) == count
        for i, (image, _) in enumerate(map(pickle.loads(pickle.dumps(samples)).__getitem__, range(count))):
            assert image.mode == "RGB" and np.array_equal(image, picture(first + i))
    return [data.train[i][1] for i in range(6)], [data.test[i][1] for i in range(3)]


def test_digits():
    data = open_data("digits")
    assert (data.name, data.num_classes, data.channels, data.size) == ("digits", 10, 1, 8)
    assert (len(data.train), len(data.test)) == (1437, 360)
    image, label = data.train[3]
    assert image.shape == (1, 8, 8) and 0 <= image.min() < image.max() == 1 and type(label) is int


def test_idx_folder_keeps_bytes(tmp_path):
    pixels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4)
    data = open_data(str(idx_folder(tmp_path, **{TEST: idx(pixels)})))
    assert torch.equal(data.test[1][0], torch.tensor(pixels[1:])) and data.test[1][1] == 0
    assert data.classes == ("0", "1", "2", "3") and data.size == 4


def test_image_folder(tmp_path):
    labels = check_pictures(open_data(str(picture_folder(tmp_path))), ("ant", "bee"), tmp_path.name)
    assert labels == ([0, 0, 0, 1, 1, 1], [0, 0, 1])


def test_image_folder_with_names_of_other_alphabets(tmp_path):
    folder = picture_folder(tmp_path)
    (folder / "train" / "ant" / "000.png").rename(folder / "train" / "ant" / "蟻.png")
    data = open_data(str(folder))
    assert np.array_equal(data.train[2][0], picture(0))


@pytest.mark.parametrize("shards", [1, 3])
def test_shards(tmp_path, shards):
    folder = shard_folder(tmp_path / "flowers", shards, 6 // shards)
    assert check_pictures(open_data(str(folder)), name="flowers") == ([0, 1, 0, 1, 0, 1], [0, 1, 0])
    check_pictures(open_data(str(folder / f"train-{{000..{shards - 1:03}}}.tar")))
    # A pattern may match a part of the shards.
    assert len(open_data(str(folder / "train-000.tar")).train) == 6 // shards


def test_shards_with_other_members(tmp_path):
    folder = shard_folder(tmp_path)
    write_shard(folder / "train-001.tar", [
        ("README", b"about"),
        ("a.b/long/" + "n" * 120 + ".cls", b" 1\n"),  # a name that needs the extended header
        ("a.b/long/" + "n" * 120 + ".json", b"{}"),
        ("a.b/long/" + "n" * 120 + ".PNG", raw_picture(9)),
        ("a.b/long/" + "n" * 120 + ".seg.png", raw_picture(8)),
    ])  # fmt: skip
    data = open_data(str(folder))
    image, label = data.train[2]
    assert len(data.train) == 5 and label == 1 and np.array_equal(image, picture(9))


def test_expand():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{0..1}-{2..3}.tar") == ["0-2.tar", "0-3.tar", "1-2.tar", "1-3.tar"]
    assert expand("train.tar") == ["train.tar"]


@pytest.mark.parametrize(("members", "words"), [
    ([("0.png", b""), ("0.cls", b"ant")], "0.cls: wanted the number of a class, below 1000000, got 'ant'"),
    ([("0.png", b""), ("0.cls", b"")], "wanted the number of a class, below 1000000, got ''"),
    ([("0.png", b""), ("0.cls", b"9" * 30)], "wanted the number of a class, below 1000000, got '9+'"),
    ([("0.png", b""), ("1.png", b""), ("1.cls", b"1")], "train-000.tar: wanted 0 with an image and a .cls"),
    ([("0.txt", b"")], "train-000.tar: no images"),
    ([], "train-000.tar: no images"),
])  # fmt: skip
def test_shards_refuse_members(tmp_path, members, words):
    write_shard(shard_folder(tmp_path, 1) / "train-000.tar", members)
    refused(tmp_path, words)


def test_shards_refuse_files(tmp_path):
    folder = shard_folder(tmp_path, 2)
    refused(folder / "train-{000..002}.tar", "no file .*train-002.tar")
    raw = (folder / "train-000.tar").read_bytes()
    for damaged in (raw[:700], raw[:100], b"no tar" * 1000, gzip.compress(raw)):
        (folder / "train-000.tar").write_bytes(damaged)
        refused(folder, r"train-000.tar: cannot be read as an uncompressed tar file: ")
    (folder / "val-0.tar").unlink()
    refused(folder, r"wanted shards train\*.tar and val\*.tar .or test\*.tar")


def test_shards_name_a_damaged_image(tmp_path):
    folder = shard_folder(tmp_path, 1)
    write_shard(folder / "train-000.tar", [("7.png", b"no picture"), ("7.cls", b"1")])
    data = open_data(str(folder))
    with pytest.raises(DataError, match=r"train-000.tar: 7.png: cannot be read: cannot identify image file$"):
        data.train[0]
    (folder / "train-000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000.tar: 7.png: cannot be read: .*No such file"):
        data.train[0]


def test_torchvision_in_memory(tmp_path):
    raw = idx_folder_of(tmp_path / "FashionMNIST" / "raw")
    data = open_data("torchvision:FashionMNIST", data_root=tmp_path)
    assert (data.name, data.num_classes, data.channels, data.size) == ("FashionMNIST", 10, 1, 5)
    assert data.classes[0] == "T-shirt/top"
    image, label = data.train[4]
    assert image.dtype == torch.uint8 and torch.equal(image[0], torch.tensor(raw[4])) and label == 1


def idx_folder_of(folder):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 5), dtype=np.uint8)
    idx_folder(folder, **{TRAIN: idx(pixels), TEST: idx(pixels[:2])})
    assert {path.name for path in folder.iterdir()} == {TRAIN, TRAIN_LABELS, TEST, TEST_LABELS}
    return pixels


def test_torchvision_files(tmp_path):
    root = tmp_path / "country211"
    picture_folder(root)
    (root / "val").rename(root / "test")
    data = open_data("torchvision:Country211", data_root=tmp_path)
    assert check_pictures(data, ("ant", "bee"), "Country211") == ([0, 0, 0, 1, 1, 1], [0, 0, 1])
    (root / "train" / "ant" / "001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"^torchvision:Country211 train, image 1: cannot be read: cannot identify"):
        data.train[1]


def test_torchvision_refuses(tmp_path, monkeypatch):
    refused("torchvision:CIFAR1000", "^torchvision:CIFAR1000: wanted one of CIFAR10, CIFAR100, Country211")
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    refused("torchvision:SVHN", "torchvision:SVHN: not in .*, and cannot be downloaded: no network", data_root=tmp_path)
    (tmp_path / "file").touch()
    refused("torchvision:SVHN", "torchvision:SVHN: not in .*/file", data_root=tmp_path / "file")


@pytest.fixture
def datasets(monkeypatch, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets


def tables(datasets, folder, **features):
    """Writes the pictures as a Hugging Face data set: training images as bytes, evaluation images as paths."""

    def table(numbers, paths):
        rows = {"label": [number % 2 for number in numbers]}
        rows["image"] = [{"bytes": None if paths else raw_picture(n), "path": f"{folder}/{n}.png"} for n in numbers]
        kinds = {"label": datasets.ClassLabel(names=["ant", "bee"]), "image": datasets.Image(), **features}
        return datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))

    for number in range(100, 103):
        (folder / f"{number}.png").write_bytes(raw_picture(number))
    return datasets.DatasetDict(train=table(range(6), False), test=table(range(100, 103), True))


def test_huggingface(tmp_path, datasets):
    tables(datasets, tmp_path).save_to_disk(tmp_path / "flowers")
    data = open_data(str(tmp_path / "flowers"))
    assert check_pictures(data, ("ant", "bee"), "flowers") == ([0, 1, 0, 1, 0, 1], [0, 1, 0])


def test_huggingface_in_workers(tmp_path, datasets):
    tables(datasets, tmp_path).save_to_disk(tmp_path / "flowers")
    samples = open_data(str(tmp_path / "flowers")).train
    transform = Transform(Augmentation(image_size=8), training=True)
    one, two = (training_batches(samples, transform, batch_size=6, steps=3, seed=0, workers=n) for n in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_huggingface_by_name(tmp_path, datasets, monkeypatch):
    found = tables(datasets, tmp_path)
    found["validation"] = found["train"].select(range(2))
    calls = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: calls.append(names) or found)
    data = open_data("hf:somebody/flowers:small")
    assert calls == [("somebody/flowers", "small")] and data.name == "flowers" and len(data.test) == 2
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: (_ for _ in ()).throw(ConnectionError("no\nnetwork")))
    refused("hf:flowers", "^hf:flowers: cannot be loaded: no network$")


def test_huggingface_refuses(tmp_path, datasets):
    found = tables(datasets, tmp_path)
    datasets.DatasetDict(train=found["train"]).save_to_disk(tmp_path / "one")
    refused(tmp_path / "one", "one: wanted the splits train and validation or test, got train$")
    tables(datasets, tmp_path, label=datasets.Value("int64")).save_to_disk(tmp_path / "numbers")
    refused(tmp_path / "numbers", r"and one of type ClassLabel, got label .Value., image .Image.$")
    picture_row = {"bytes": raw_picture(0), "path": None}
    rows = {"label": [0, 0, -1], "image": [{"bytes": b"no picture", "path": "a.png"}, None, picture_row]}
    table = datasets.Dataset.from_dict(rows, features=found["train"].features)
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "bad")
    data = open_data(str(tmp_path / "bad"))
    with pytest.raises(DataError, match=r"bad train, row 0 \(a.png\): cannot be read: cannot identify"):
        data.train[0]
    with pytest.raises(DataError, match="bad test, row 1: has no image"):
        data.test[1]
    with pytest.raises(DataError, match="bad test, row 2: has no label"):
        data.test[2]
    (tmp_path / "bad" / "train" / "state.json").write_text("{")
    refused(tmp_path / "bad", "bad: cannot be loaded: ")


def test_huggingface_is_optional(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    refused("hf:flowers", "need the package datasets: pip install datasets")


def test_one_class(tmp_path):
    folder = shard_folder(tmp_path, 1, 1, 1)
    refused(folder, "wanted at least 2 classes, got 1")


def test_unknown(tmp_path):
    refused("cifar", "^no folder 'cifar': --data takes 'digits', 'torchvision:NAME', 'hf:NAME', shards")
