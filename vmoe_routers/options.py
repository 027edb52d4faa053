"""OptionError, for an option with an unusable value. The command line changes option names to the user's spelling."""

from __future__ import annotations

MAX_CAPACITY_FACTOR = 1e4  # a factor of num_experts already gives every expert a slot for every token


class OptionError(ValueError):
    """Value of an option that cannot be used.

    Attributes:
        options: Names of the options at fault as the message spells them: `image_size`, not `--image-size`.
    """

    def __init__(self, message: str, *options: str):
        super().__init__(message, *options)
        self.message: str = message
        self.options: tuple[str, ...] = options

    def __str__(self) -> str:
        return self.message
