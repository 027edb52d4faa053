"""The error of functions that read data."""


class DataError(ValueError):
    """Data that cannot be read. The message says what was wanted."""
