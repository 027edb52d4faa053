"""CheckpointError, raised by all readers and writers of files."""


class CheckpointError(ValueError):
    """Reports a checkpoint that cannot be read or written. The message names the file and the problem."""
