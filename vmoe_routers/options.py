"""Errors that name an option, so that the command line can say how the user typed it."""

from __future__ import annotations

MAX_CAPACITY_FACTOR = 1e4  # far beyond a slot for every token at every expert


class OptionError(ValueError):
    """An option's value cannot be used.

    Attributes:
        options: names of options, which the message contains as words: `image_size`, not `--image-size`.
    """

    def __init__(self, message: str, *options: str):
        super().__init__(message, *options)
        self.message, self.options = message, options

    def __str__(self) -> str:
        return self.message
