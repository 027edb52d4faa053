"""Ctrl-C while a command of this package starts: the process ends at once, without a traceback.

The package imports this module first, because importing torch takes seconds in which Python would show where it was.
Nothing changes for a program that imports the package, nor where Ctrl-C is ignored or handled already.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


def _is_command() -> bool:
    """Whether this process is ``vmoe-routers`` or ``python -m vmoe_routers``."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # as long as Python looks for the module
        following = sys.orig_argv[sys.orig_argv.index("-m") + 1 :] if "-m" in sys.orig_argv else []
        return following[:1] == ["vmoe_routers"]
    return program.replace("\\", "/").rpartition("/")[2] in ("vmoe-routers", "vmoe-routers.exe")


def end_at_once() -> None:
    """Lets Ctrl-C end the process, where it would raise KeyboardInterrupt."""
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def raising() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt inside, where it would end the process."""
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
