"""Handles Ctrl-C and SIGTERM: the first signal ends the training after saving, the second ends it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupt:
    """Request of the user or the cluster to end the training.

    Attributes:
        asked: Whether the request came.
    """

    def __init__(self) -> None:
        self.asked: bool = False

    def _ask(self, number: int, frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def asking() -> Iterator[Interrupt]:
    """Lets the first Ctrl-C or SIGTERM set `Interrupt.asked`. The second raises KeyboardInterrupt."""
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield interrupt
        return
    old = {number: signal.signal(number, interrupt._ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield interrupt
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
