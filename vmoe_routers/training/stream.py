"""Randomness as a function of a key: no state needs to be saved, and training can continue at any step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from vmoe_routers.training.seeding import seed_of


def generator_of(*key: int | str) -> torch.Generator:
    """Makes a generator seeded by the key."""
    return torch.Generator().manual_seed(seed_of(*key))


def seed_cpu(*key: int | str) -> None:
    """Seeds the generators of random, numpy and torch (CPU) by the key.

    The generators of CUDA are not seeded, because workers must not use CUDA.
    """
    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Restores the states of the generators of random, numpy and torch (CPU) when the context ends."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


class Order:
    """Global batches of a training: the images of every step.

    An epoch is a random order of all images. An incomplete last batch is left out. With repeats, a batch has
    ``batch_size / repeats`` images, each `repeats` times. An epoch has as many steps as without repeats.

    Args:
        size: number of images.
        batch_size: images of a batch on all ranks.
        seed: the seed of the order.
        repeats: copies of an image in its batch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, repeats: int = 1):
        self.size: int = size
        self.batch_size: int = batch_size
        self.seed: int = seed
        self.repeats: int = repeats
        self.steps_per_epoch: int = size // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.long)

    def batch(self, step: int) -> tuple[int, Tensor, Tensor]:
        """Returns the epoch of a step, and the indices and copy numbers of its images, both [batch_size] int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(self.size, generator=generator_of(self.seed, "order", epoch))
            self._epoch = epoch
        count = self.batch_size // self.repeats
        # Order by copy, so that a rank and a routing group have as many different images as possible.
        chosen = self._order[place * count : (place + 1) * count].repeat(self.repeats)
        return epoch, chosen, torch.arange(self.repeats).repeat_interleave(count)
