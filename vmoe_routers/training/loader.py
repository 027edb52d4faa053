"""Batches for training and evaluation. Their images depend only on the seed and the step.

The order is a function of (seed, epoch), and the augmentation of an image a function of (seed, epoch, index, copy). So
batches do not depend on the number of workers, training can continue at any step, and the loader has no state to save.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vmoe_routers.options import OptionError
from vmoe_routers.training.error import DataError
from vmoe_routers.training.samples import Samples, Tensors
from vmoe_routers.training.stream import Order, generator_of, generators_kept, seed_cpu
from vmoe_routers.training.transforms import Transform

MOST_WORKERS = 1024
_MOST_BAD = 100  # unreadable images in a row that end the training; also the number of names that are kept
BAD_IMAGES = ("stop", "skip")


class Batch(NamedTuple):
    """Batch on this rank.

    Attributes:
        images: [N, channels, height, width] float32, normalized, on the device.
        labels: [N] int64, on the device.
        valid: [N] bool, on the device: False for padding and unreadable images, which evaluation must not count.
    """

    images: Tensor
    labels: Tensor
    valid: Tensor


class Batches(Iterator[Batch]):
    """Iterator over batches. Use it in a `with` block, which ends the workers.

    Attributes:
        skipped: number of unreadable images that this rank has skipped so far.
        bad_images: errors that name the first 100 unreadable images.
        waited: seconds spent waiting for batches, without the wait for the first batch.
        elapsed: seconds from the first batch to the latest batch.
    """

    def __init__(self, source: Iterator[_Raw], transform: Transform, device: torch.device | str, steps: int):
        self._source, self._transform, self._device = source, transform, torch.device(device)
        self._left = steps
        self._first: float | None = None
        self.skipped: int = 0
        self.bad_images: list[str] = []
        self.waited: float = 0.0
        self.elapsed: float = 0.0

    @property
    def waiting(self) -> float:
        """Share of the time spent waiting for data, in [0, 1]."""
        return self.waited / self.elapsed if self.elapsed else 0.0

    def __len__(self) -> int:
        """Returns the number of batches that are left."""
        return self._left

    def __next__(self) -> Batch:
        """Returns the next batch.

        Raises:
            DataError: an image cannot be read and `bad_images` is "stop", or a worker died.
        """
        if not self._left:
            raise StopIteration
        start = time.perf_counter()
        try:
            raw = next(self._source)
        except RuntimeError as error:
            self.close()
            if (told := _of_worker(error)) is error:
                raise
            raise told from error
        if raw.error is not None:
            self.close()
            raise DataError(raw.error)
        self.skipped += len(raw.bad)
        self.bad_images += raw.bad[: _MOST_BAD - len(self.bad_images)]
        images, labels, valid = (x.to(self._device, non_blocking=True) for x in (raw.images, raw.labels, raw.valid))
        batch = Batch(images if raw.normalized else self._transform.normalize(images), labels, valid)
        end = time.perf_counter()
        if self._first is None:
            self._first = end
        else:
            self.waited += end - start
            self.elapsed = end - self._first
        self._left -= 1
        return batch

    def close(self) -> None:
        """Ends the workers.

        torch ends the workers when its iterator is deleted. A traceback may keep the iterator alive. Python would then
        wait forever at its exit, because the workers ignore SIGTERM.
        """
        getattr(self._source, "_shutdown_workers", lambda: None)()
        self._source, self._left = iter(()), 0

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.close()
        # torch raises the error of a dead worker at any point in the main process, also between batches.
        if isinstance(error, RuntimeError) and (told := _of_worker(error)) is not error:
            raise told from error


def smaller_batch(images: int) -> int:
    """Suggests a batch size for few images: the largest power of two up to half of their number, at least 1."""
    return 1 << max(0, (max(images, 0) // 2).bit_length() - 1)


def training_batches(
    samples: Samples,
    transform: Transform,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    first_step: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    bad_images: str = "stop",
    device: torch.device | str = "cpu",
) -> Batches:
    """Makes the batches of the steps `first_step` to `steps - 1`, for one rank.

    For every number of ranks, the global batch of a step has the same images with the same augmentation. A rank has the
    part ``[rank * batch_size / world, (rank + 1) * batch_size / world)``. An incomplete last batch of an epoch is left
    out.

    Args:
        samples: the data set. `Tensors` are augmented in whole batches, without workers, if the transform supports
            whole batches.
        transform: a transform for training. Its `repeats` is the number of copies of an image in a batch.
        batch_size: images per step on all ranks.
        steps: steps of the whole training.
        seed: seed of order and augmentation.
        first_step: the step to begin with, from 0.
        rank, world: number of this process, and of processes.
        workers: processes that read images. 0 reads in this process.
        bad_images: "stop" at an unreadable image, or "skip" it: the next readable image of the data set replaces it.
        device: where the batches go.

    Raises:
        OptionError: an option out of range.
    """
    repeats = transform.augmentation.repeats
    _check_options(samples, batch_size, rank, world, workers, bad_images)
    if len(samples) < batch_size:
        raise OptionError(
            f"batch_size must be at most the {len(samples)} training images, got {batch_size}; wanted for example "
            f"{smaller_batch(len(samples))}",
            "batch_size",
        )
    if batch_size % repeats:
        raise OptionError(
            f"batch_size must be a multiple of repeats {repeats}, got {batch_size}", "batch_size", "repeats"
        )
    if not 0 <= first_step <= steps:
        raise OptionError(f"steps must be at least the first step, {first_step} (from 0), got {steps}", "steps")
    order = Order(len(samples), batch_size, seed, repeats)
    part = slice(rank * (batch_size // world), (rank + 1) * (batch_size // world))
    if isinstance(samples, Tensors) and transform.by_batch:
        source = _tensor_training(samples, transform, order, part, first_step, torch.device(device))
    else:
        draws = _Draws(order, part, first_step, steps)
        source = _read(_Reader(samples, transform, seed, bad_images), draws, workers, device)
    return Batches(source, transform, device, steps - first_step)


def evaluation_batches(
    samples: Samples,
    transform: Transform,
    *,
    batch_size: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 2,
    bad_images: str | None = None,
    device: torch.device | str = "cpu",
) -> Batches:
    """Makes batches of all images in order, for one rank. All ranks have equally many batches of equal sizes.

    The last batch is padded with the last image. `Batch.valid` is False for padding, so that every image counts once.
    With one rank, there is no padding.

    Args:
        samples: the data set. `Tensors` are transformed in whole batches without workers.
        transform: a transform for evaluation.
        batch_size: images per batch on all ranks.
        rank, world: number of this process, and of processes.
        workers: processes that read images. 0 reads in this process.
        bad_images: "stop" at an unreadable image, or "skip" it: its `valid` is False. None: as "stop", for a command
            without the option --bad-images. The error then does not advise to skip.
        device: where the batches go.

    Raises:
        OptionError: an option out of range.
    """
    _check_options(samples, batch_size, rank, world, workers, bad_images)
    size, batches = len(samples), []
    for first in range(0, size, batch_size):
        count = -(-min(batch_size, size - first) // world)
        batches.append(range(first + rank * count, first + (rank + 1) * count))
    if isinstance(samples, Tensors) and transform.by_batch:
        source = _tensor_evaluation(samples, transform, batches, torch.device(device))
    else:
        draws = [[(0, index, 0) for index in batch] for batch in batches]
        source = _read(_Reader(samples, transform, None, bad_images), draws, workers, device)
    return Batches(source, transform, device, len(batches))


def _check_options(
    samples: Samples, batch_size: int, rank: int, world: int, workers: int, bad_images: str | None
) -> None:
    if batch_size < 1 or batch_size % world:
        raise OptionError(
            f"batch_size must be a positive multiple of {world}, the number of ranks, got {batch_size}", "batch_size"
        )
    if not 0 <= rank < world:
        raise OptionError(f"rank must be in [0, {world}), got {rank}", "rank")
    if not 0 <= workers <= MOST_WORKERS:
        raise OptionError(f"workers must be at least 0 and at most {MOST_WORKERS}, got {workers}", "workers")
    if bad_images is not None and bad_images not in BAD_IMAGES:
        raise OptionError(f"bad_images must be {' or '.join(BAD_IMAGES)}, got {bad_images!r}", "bad_images")
    if not len(samples):
        raise DataError("the data set has no images")


class _Raw(NamedTuple):
    images: Tensor  # uint8; float32 if normalized
    labels: Tensor
    valid: Tensor
    normalized: bool = False
    bad: Sequence[str] = ()
    error: str | None = None


_Draw = tuple[int, int, int]  # epoch, index, copy


class _Draws:
    """Iterable of the draws of a rank's batches."""

    def __init__(self, order: Order, part: slice, first_step: int, steps: int):
        self.order, self.part, self.first_step, self.steps = order, part, first_step, steps

    def __iter__(self) -> Iterator[list[_Draw]]:
        for step in range(self.first_step, self.steps):
            epoch, indices, copies = self.order.batch(step)
            pairs = zip(indices[self.part].tolist(), copies[self.part].tolist(), strict=True)
            yield [(epoch, index, copy) for index, copy in pairs]


class _Reader:
    """Reads a batch of images, in a worker. Without a seed it reads for evaluation."""

    def __init__(self, samples: Samples, transform: Transform, seed: int | None, bad_images: str | None):
        self.samples, self.transform, self.seed = samples, transform, seed
        self.skips, self.advises = bad_images == "skip", bad_images == "stop"

    def __getitem__(self, draws: list[_Draw]) -> _Raw:
        images, labels, valid, bad = [], [], [], []
        try:
            with generators_kept():  # without workers, this runs in the main process
                for draw in draws:
                    image, label, is_valid = self._read(draw, bad)
                    images.append(image)
                    labels.append(label)
                    valid.append(is_valid)
        except DataError as error:
            nothing = torch.empty(0)
            return _Raw(nothing, nothing, nothing, error=str(error))
        return _Raw(torch.stack(images), torch.tensor(labels), torch.tensor(valid), bad=bad)

    def _read(self, draw: _Draw, bad: list[str]) -> tuple[Tensor, int, bool]:
        epoch, index, copy = draw
        size = len(self.samples)
        if self.seed is None:
            try:
                image, label = self.samples[min(index, size - 1)]
            except DataError as error:
                if not self.skips:
                    raise self._with_advice(error) from None
                if index < size:
                    bad.append(str(error))
                pixels = self.transform.augmentation.image_size
                return torch.zeros(self.transform.channels, pixels, pixels, dtype=torch.uint8), 0, False
            return self.transform(image), label, index < size
        image, label = self._readable(index, bad)
        seed_cpu(self.seed, "image", epoch, index, copy)
        return self.transform(image), label, True

    def _readable(self, index: int, bad: list[str]) -> tuple[Any, int]:
        size = len(self.samples)
        for other in range(index, index + min(size, _MOST_BAD)):
            try:
                return self.samples[other % size]
            except DataError as error:
                if not self.skips:
                    raise self._with_advice(error) from None
                bad.append(str(error))
        raise DataError(f"{min(size, _MOST_BAD)} images in a row cannot be read, the last: {bad[-1]}")

    def _with_advice(self, error: DataError) -> DataError:
        if self.advises:
            return DataError(f"{error}; --bad-images skip leaves unreadable images out and counts them")
        return error


def _read(reader: _Reader, draws: Any, workers: int, device: torch.device | str) -> Iterator[_Raw]:
    loader = DataLoader(
        reader,  # type: ignore[arg-type]  # a batch is one item, so torch collates nothing
        batch_size=None,
        sampler=draws,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # torch would draw from the main process's generator
    )
    return iter(loader)


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_interrupts(worker: int) -> None:
    """Ignores signals in a worker, because the main process ends the worker after saving.

    torchrun and Slurm send signals to workers, too.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _of_worker(error: RuntimeError) -> Exception:
    """Returns a DataError if the error means a dead worker, otherwise the error itself."""
    text = str(error)
    if "DataLoader worker" not in text or "Caught" in text:
        return error
    reason = text.splitlines()[0]
    return DataError(
        f"a worker that reads images died, perhaps for lack of memory (fewer --workers need less): {reason}"
    )


def _tensor_training(
    samples: Tensors, transform: Transform, order: Order, part: slice, step: int, device: torch.device
) -> Iterator[_Raw]:
    images, labels = samples.images.to(device), samples.labels.to(device)
    drawn = -1
    draws = torch.empty(0)
    while True:
        epoch, indices, copies = order.batch(step)
        if epoch != drawn:
            # Draw for all images, because a draw is a function of (seed, epoch, index, copy).
            generator = generator_of(order.seed, "shift", epoch)
            draws = transform.draw(order.repeats * order.size, generator).view(order.repeats, order.size, -1)
            drawn = epoch
        indices, copies = indices[part], copies[part]
        chosen = draws[copies, indices]
        indices = indices.to(device)
        valid = torch.ones(len(indices), dtype=torch.bool)
        yield _Raw(transform.batch(images[indices], chosen), labels[indices], valid, normalized=True)
        step += 1


def _tensor_evaluation(
    samples: Tensors, transform: Transform, batches: list[range], device: torch.device
) -> Iterator[_Raw]:
    for batch in batches:
        indices = torch.tensor(batch)
        chosen = indices.clamp(max=len(samples) - 1)
        images = transform.batch(samples.images[chosen].to(device))
        yield _Raw(images, samples.labels[chosen], indices < len(samples), normalized=True)
