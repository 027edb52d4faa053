"""Random numbers as a function of a key, so that a training needs to keep no generator's state."""

from __future__ import annotations

import hashlib
from typing import Any


def seed_of(*key: Any) -> int:
    """Hashes a key of numbers and texts to a seed in [0, 2^63)."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
