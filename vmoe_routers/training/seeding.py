"""Random seeds as a function of a key, so that a training need not save the state of a generator."""

from __future__ import annotations

import hashlib
from typing import Any


def seed_of(*key: Any) -> int:
    """Hashes a key of numbers and strings to a seed in [0, 2^63)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
