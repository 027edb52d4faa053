"""The one error of what reads data."""


class DataError(ValueError):
    """Data that cannot be read, in words that say what to do."""
