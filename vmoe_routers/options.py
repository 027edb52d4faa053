"""OptionError, for an option with an unusable value, and a suggestion for a mistyped name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MAX_CAPACITY_FACTOR = 1e4  # a factor of num_experts already gives every expert a slot for every token


class OptionError(ValueError):
    """Value of an option that cannot be used. The command line changes option names to the user's spelling.

    Attributes:
        options: Names of the options at fault as the message spells them: `image_size`, not `--image-size`.
    """

    def __init__(self, message: str, *options: str):
        super().__init__(message, *options)
        self.message: str = message
        self.options: tuple[str, ...] = options

    def __str__(self) -> str:
        return self.message


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Suggests the name that is closest to a mistyped word. Returns "" if none is close."""
    plain = {name.replace("_", "-"): name for name in names}
    found = get_close_matches(word.replace("_", "-"), plain, 1)
    return f"; did you mean {plain[found[0]]}?" if found else ""
