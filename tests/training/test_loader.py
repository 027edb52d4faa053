"""Batches depend on seed and step only, not on workers, first step and ranks. Also tests unreadable images."""

import multiprocessing
import os
import pickle
import random
import signal
import time

import numpy as np
import pytest
import torch
from made import picture, picture_folder, shard_folder

from vmoe_routers.options import OptionError
from vmoe_routers.training import (
    Augmentation,
    DataError,
    Tensors,
    Transform,
    evaluation_batches,
    open_data,
    training_batches,
)
from vmoe_routers.training.loader import _Draws, _Reader
from vmoe_routers.training.stream import Order

STRONG = Augmentation(image_size=8, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.5, scale=(0.3, 1.0))
SIMPLE = Augmentation(image_size=8, scale=None, shift=1, normalization="none", crop_pct=1.0)


class Numbers:
    """Pictures in memory, as a data set of files returns them. The label and the first pixel are the index."""

    def __init__(self, size=20, bad=()):
        self.size, self.bad = size, bad

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise DataError(f"{index}.png: no picture")
        return picture(index), index


def tensors(size=20):
    images = torch.randint(256, (size, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Tensors(images, torch.arange(size))


def train(samples, augmentation=STRONG, channels=3, **options):
    options = {"batch_size": 6, "steps": 7, "seed": 5, "workers": 0, **options}
    with training_batches(samples, Transform(augmentation, channels, training=True), **options) as batches:
        return list(batches)


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for one, two in zip(a, b) for x, y in zip(one, two))


@pytest.fixture(scope="module")
def undisturbed():
    return train(Numbers())


def test_batches_of_pictures(undisturbed):
    assert len(undisturbed) == 7
    for images, labels, valid in undisturbed:
        assert images.shape == (6, 3, 8, 8) and images.dtype == torch.float32 and -1 <= images.min() < images.max() <= 1
        assert labels.dtype == torch.int64 and valid.all()
    for epoch in (undisturbed[:3], undisturbed[3:6]):
        labels = torch.cat([labels for _, labels, _ in epoch])
        assert len(labels.unique()) == 18
    assert not torch.equal(undisturbed[0].labels, undisturbed[3].labels)
    # Another epoch, or another seed, augments an image in another way.
    first, again = (
        next(images[labels == 3] for images, labels, _ in part if 3 in labels)
        for part in (undisturbed, undisturbed[3:])
    )
    assert not torch.equal(first, again)
    assert not same(undisturbed, train(Numbers(), seed=6))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(undisturbed, workers):
    assert same(undisturbed, train(Numbers(), workers=workers))


def test_workers_that_get_a_pickled_copy(undisturbed):
    """Workers get a pickled copy on systems where processes are not forked."""
    reader = pickle.loads(pickle.dumps(_Reader(Numbers(), Transform(STRONG, training=True), 5, "stop")))
    draws = next(iter(_Draws(Order(20, 6, 5), slice(0, 6), 0, 1)))
    assert torch.equal(reader.transform.normalize(reader[draws].images), undisturbed[0].images)


@pytest.mark.parametrize("first_step", [1, 5, 7])
def test_resume(undisturbed, first_step):
    assert same(undisturbed[first_step:], train(Numbers(), first_step=first_step))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batch(undisturbed, world):
    ranks = [train(Numbers(), rank=rank, world=world) for rank in range(world)]
    assert same(undisturbed, [[torch.cat(part) for part in zip(*parts)] for parts in zip(*ranks)])


@pytest.mark.parametrize("repeats", [1, 3])
def test_tensors(repeats):
    augmentation = Augmentation(**{**vars(SIMPLE), "repeats": repeats, "hflip": 0.5})
    whole = train(tensors(), augmentation, 1)
    assert whole[0].images.shape == (6, 1, 8, 8)
    assert same(whole, train(tensors(), augmentation, 1, workers=2))
    assert same(whole[4:], train(tensors(), augmentation, 1, first_step=4))
    ranks = [train(tensors(), augmentation, 1, rank=rank, world=2) for rank in range(2)]
    assert same(whole, [[torch.cat(part) for part in zip(*parts)] for parts in zip(*ranks)])
    assert len({tuple(batch.labels.tolist()) for batch in whole}) == 7


def test_tensors_are_shifted_and_flipped():
    """Shifts by up to one pixel and flips can give 18 images. Each result is one of the 18, and all 18 occur."""
    samples = tensors()
    seen = set()
    for images, labels, _ in train(samples, Augmentation(**{**vars(SIMPLE), "hflip": 0.5}), 1, steps=60):
        for image, label in zip(images, labels):
            padded = torch.nn.functional.pad(samples.images[label, 0] / 255, [1] * 4)
            crops = {(i, j): padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)}
            found = {(*key, flip) for key, crop in crops.items() for flip in (0, 1)
                     if torch.equal(crop.flip(-1) if flip else crop, image[0])}  # fmt: skip
            assert len(found) == 1
            seen |= found
    assert len(seen) == 18


@pytest.mark.parametrize("samples", [Numbers(), tensors()], ids=["pictures", "tensors"])
def test_repeated_augmentation(samples):
    channels = 1 if isinstance(samples, Tensors) else 3
    augmentation = Augmentation(**{**vars(SIMPLE), "repeats": 3})
    for images, labels, _ in train(samples, augmentation, channels, batch_size=12, steps=2):
        assert labels.tolist() == labels[:4].tolist() * 3 and len(labels.unique()) == 4
        copies = images.view(3, 4, *images.shape[1:])
        assert not torch.equal(copies[0], copies[1]) and not torch.equal(copies[1], copies[2])


def test_generators_of_the_main_process_are_not_disturbed():
    def draws():
        return random.random(), np.random.rand(), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    wanted = draws()
    for samples, channels in ((Numbers(), 3), (tensors(), 1)):
        for workers in (0, 1):
            random.seed(3), np.random.seed(3), torch.manual_seed(3)
            train(samples, Augmentation(**{**vars(STRONG), "repeats": 3}), channels, steps=1, workers=workers)
            assert draws() == wanted


def test_bad_images_stop(tmp_path):
    folder = picture_folder(tmp_path)
    (folder / "train" / "bee" / "004.png").write_bytes(b"no picture")
    for workers in (0, 1):
        wanted = r"train/bee/004.png: cannot be read: cannot identify image file; --bad-images skip leaves .* out"
        with pytest.raises(DataError, match=wanted) as error:
            train(open_data(str(folder)).train, workers=workers, steps=1)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"train/bee/004.png: cannot be read: cannot identify image file$"):
        list(
            evaluation_batches(open_data(str(folder)).train, Transform(STRONG, training=False), batch_size=4, workers=0)
        )


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_counted(undisturbed, workers):
    bad = Numbers(bad=(4, 5, 19))
    options = {"bad_images": "skip", "workers": workers, "batch_size": 6, "steps": 6, "seed": 5}
    with training_batches(bad, Transform(STRONG, training=True), **options) as batches:
        found = list(batches)
        wanted = torch.stack([labels for _, labels, _ in undisturbed[:6]])
        # The next readable image replaces an unreadable one; each try is counted.
        replaced = {4: 6, 5: 6, 19: 0}
        tries = sum({4: 2, 5: 1, 19: 1}.get(label, 0) for label in wanted.flatten().tolist())
        assert batches.skipped == tries > 3 and set(batches.bad_images) <= {f"{i}.png: no picture" for i in (4, 5, 19)}
    wanted.apply_(lambda label: replaced.get(label, label))
    assert torch.equal(torch.stack([labels for _, labels, _ in found]), wanted)
    assert all(valid.all() for _, _, valid in found)


def test_nothing_readable_stops():
    with pytest.raises(DataError, match=r"^20 images in a row cannot be read, the last: \d+.png: no picture"):
        train(Numbers(bad=range(20)), bad_images="skip")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("samples", [Numbers(7), tensors(7)], ids=["pictures", "tensors"])
def test_evaluation_counts_every_image_once(samples, workers):
    channels = 1 if isinstance(samples, Tensors) else 3
    transform = Transform(SIMPLE, channels, training=False)
    (whole,) = evaluation_batches(samples, transform, batch_size=7, workers=workers)
    assert whole.valid.all() and whole.labels.tolist() == list(range(7))
    for world, counts in ((1, [3, 3, 1]), (3, [1, 1, 1])):
        found = [
            list(evaluation_batches(samples, transform, batch_size=3, rank=rank, world=world, workers=workers))
            for rank in range(world)
        ]
        assert all([len(batch.labels) for batch in rank] == counts for rank in found)
        pairs = {int(label): image for rank in found for batch in rank
                 for image, label, valid in zip(*batch) if valid}  # fmt: skip
        assert sorted(pairs) == list(range(7)) and sum(int(batch.valid.sum()) for rank in found for batch in rank) == 7
        assert all(torch.equal(image, whole.images[label]) for label, image in pairs.items())


def test_evaluation_skips_bad_images():
    batches = evaluation_batches(
        Numbers(7, bad=(6,)),
        Transform(SIMPLE, training=False),
        batch_size=4,
        world=2,
        rank=1,
        workers=0,
        bad_images="skip",
    )
    first, last = batches
    assert first.labels.tolist() == [2, 3] and first.valid.all()
    assert last.valid.tolist() == [False, False] and not last.images.any()
    assert batches.skipped == 1 and batches.bad_images == ["6.png: no picture"]


@pytest.mark.parametrize("shards", [1, 6])
def test_more_and_fewer_shards_than_workers(tmp_path, shards):
    samples = open_data(str(shard_folder(tmp_path, shards, 6 // shards))).train
    assert same(train(samples, workers=0, steps=2), train(samples, workers=2, steps=2))


class Deadly(Numbers):
    def __getitem__(self, index):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_dead_worker_is_told():
    with pytest.raises(
        DataError, match=r"^a worker that reads images died, .*--workers.*(signal: Killed|exited unexpectedly)"
    ):
        train(Deadly(), workers=1)


def test_a_dead_worker_is_told_between_batches():
    """torch raises this error in a signal handler, at any point of the main process."""
    words = "DataLoader worker (pid 7) is killed by signal: Killed. "
    transform = Transform(SIMPLE, training=True)
    with (
        pytest.raises(DataError, match="a worker that reads images died"),
        training_batches(Numbers(), transform, batch_size=6, steps=1, seed=0, workers=0),
    ):
        raise RuntimeError(words)
    with (
        pytest.raises(RuntimeError, match="unrelated"),
        training_batches(Numbers(), transform, batch_size=6, steps=1, seed=0, workers=0),
    ):
        raise RuntimeError("unrelated")


class Asking(Numbers):
    def __getitem__(self, index):
        return picture(index), int(all(signal.getsignal(n) == signal.SIG_IGN for n in (signal.SIGINT, signal.SIGTERM)))


def test_workers_ignore_interrupts():
    """The main process saves first and then ends the workers."""
    ((_, labels, _),) = train(Asking(), workers=1, steps=1)
    assert labels.all()
    ((_, labels, _),) = train(Asking(), workers=0, steps=1)
    assert not labels.any()


class Faulty(Numbers):
    def __getitem__(self, index):
        raise RuntimeError("a fault of the data set")


def test_a_fault_in_a_worker_is_no_bad_image():
    with pytest.raises(RuntimeError, match="a fault of the data set") as error:
        train(Faulty(), workers=1, bad_images="skip")
    assert error.value.__cause__ is not error.value
    assert not multiprocessing.active_children()  # although the traceback still refers to torch's iterator


class Slow(Numbers):
    def __getitem__(self, index):
        time.sleep(0.002)
        return super().__getitem__(index)


def test_waiting_is_measured():
    batches = training_batches(Slow(), Transform(SIMPLE, training=True), batch_size=6, steps=4, seed=0, workers=0)
    assert len(batches) == 4 and batches.waiting == 0
    next(batches)
    assert batches.waiting == 0  # the start of workers does not count as waiting
    next(batches)
    assert batches.waited >= 0.012 and 0 < batches.waiting <= 1
    time.sleep(0.1)
    next(batches)
    assert batches.elapsed - batches.waited >= 0.1 and batches.waiting < 1
    batches.close()
    assert list(batches) == []


@pytest.mark.parametrize(("options", "words"), [
    ({"batch_size": 21}, "batch_size must be at most the 20 training images, got 21; wanted for example 8"),
    ({"batch_size": 0}, "batch_size must be a positive multiple of 1, the number of ranks, got 0"),
    ({"batch_size": 5, "world": 2}, "batch_size must be a positive multiple of 2, the number of ranks, got 5"),
    ({"rank": 2, "world": 2}, r"rank must be in \[0, 2\), got 2"),
    ({"first_step": 8}, r"steps must be at least the first step, 8 .from 0., got 7"),
    ({"workers": -1}, "workers must be at least 0 and at most 1024, got -1"),
    ({"bad_images": "ignore"}, "bad_images must be stop or skip, got 'ignore'"),
])  # fmt: skip
def test_options_out_of_range(options, words):
    with pytest.raises(OptionError, match=f"^{words}"):
        train(Numbers(), **options)


def test_repeats_divide_the_batch():
    with pytest.raises(OptionError, match="batch_size must be a multiple of repeats 4, got 6"):
        train(Numbers(), Augmentation(**{**vars(STRONG), "repeats": 4}))


def test_no_images():
    with pytest.raises(DataError, match="the data set has no images"):
        evaluation_batches(Numbers(0), Transform(SIMPLE, training=False), batch_size=1)
