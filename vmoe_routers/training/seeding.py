"""Random numbers as a function of a key, so that a training needs to keep no generator's state."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import torch


def seed_of(*key: Any) -> int:
    """Hashes a key of numbers and texts to a seed in [0, 2^63)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_all(*key: Any) -> None:
    """Seeds the generators of random, numpy and torch by a key of numbers and texts."""
    import numpy as np

    seed = seed_of(*key)
    random.seed(seed)
    np.random.seed(seed % (1 << 32))
    torch.manual_seed(seed)
