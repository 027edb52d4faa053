"""The one error of this package's readers and writers of files."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written: the message names the file and what is wrong with it."""
