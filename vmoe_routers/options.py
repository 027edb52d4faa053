"""OptionError: an unusable value of an option. The command line rewrites the option's name as the user typed it."""

from __future__ import annotations

MAX_CAPACITY_FACTOR = 1e4  # num_experts already gives every expert a slot for every token


class OptionError(ValueError):
    """An option's value cannot be used.

    Attributes:
        options: The options at fault, spelled as in the message: `image_size`, not `--image-size`.
    """

    def __init__(self, message: str, *options: str):
        super().__init__(message, *options)
        self.message, self.options = message, options

    def __str__(self) -> str:
        return self.message
