"""DataError, raised by functions that read data."""


class DataError(ValueError):
    """Unreadable data. The message says what was wanted."""
