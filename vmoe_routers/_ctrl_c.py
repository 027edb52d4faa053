"""Lets Ctrl-C end a starting command of this package at once, without a traceback.

The package imports this module first: importing torch takes seconds, and Ctrl-C during an import prints a traceback.
A program that imports the package keeps its handling of Ctrl-C. A process that already ignores or handles Ctrl-C keeps
doing so.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def _is_command() -> bool:
    """Tells whether this process runs ``vmoe-routers`` or ``python -m vmoe_routers``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # the value while Python looks for the module
        following = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return following[:1] == ["vmoe_routers"]
    return program.replace("\\", "/").rpartition("/")[2] in ("vmoe-routers", "vmoe-routers.exe")


def end_at_once() -> None:
    """Lets Ctrl-C end the process instead of raising KeyboardInterrupt."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raising() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt within the context, after `end_at_once`."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


if _is_command():
    end_at_once()
