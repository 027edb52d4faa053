"""Worker processes that ignore Ctrl-C, which the parent handles, and that end with the parent."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

# A worker cannot watch its parent during the import of torch, which takes seconds. The guard is a process without such
# imports. The guard reads the process ids of the workers. When the parent ends, the guard's input closes, and the guard
# kills the workers.
_GUARD = """
import os, signal, sys
for process in sys.stdin.read().split():
    try:
        os.kill(int(process), signal.SIGKILL)
    except OSError:
        pass
"""


class Workers:
    """Pool of processes, which start with the first calls. Leaving the context ends the processes.

    Args:
        count: The largest number of processes.
        start: A function that every process calls first, with `arguments`.
        arguments: Picklable arguments.
    """

    def __init__(self, count: int, start: Callable[..., None], *arguments: Any):
        self._executor = ProcessPoolExecutor(
            count, multiprocessing.get_context("spawn"), initializer=start, initargs=arguments
        )
        self._guarded: set[int] = set()

    def __enter__(self) -> Workers:
        with ignoring_ctrl_c():
            self._guard = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _GUARD],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        return self

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Calls the function with picklable arguments in a worker."""
        with ignoring_ctrl_c():
            future = self._executor.submit(function, *arguments)
            new = set(self._executor._processes or ()) - self._guarded
            self._guarded |= new
            with suppress(BrokenPipeError):
                self._guard.stdin.write("".join(f"{process}\n" for process in new))  # type: ignore[union-attr]
                self._guard.stdin.flush()  # type: ignore[union-attr]
        return future

    def __exit__(self, *_: object) -> None:
        with ignoring_ctrl_c():
            for process in list((self._executor._processes or {}).values()):
                process.terminate()
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._guard.kill()
            self._guard.communicate()


@contextmanager
def ignoring_ctrl_c() -> Iterator[None]:
    """Ignores Ctrl-C within the context. Processes that start within the context ignore it until they end."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
