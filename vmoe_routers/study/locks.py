"""Locks of runs, so that several processes and machines may share the folder of a study."""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from vmoe_routers.files import write_whole

EXPIRY = 600.0
"""Seconds after which another machine takes over a lock that was not renewed."""
_RENEWAL = 60.0
_WITHOUT_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)  # errors of file systems such as FAT


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock of a record within the context, and renews it every minute.

    Args:
        path: The record's path. The lock is a file beside it.

    Yields:
        Whether the lock was free. A lock is also free if its process ended on this machine, or if it was not
        renewed for `EXPIRY` seconds.

    Raises:
        OSError: The folder cannot be written.
    """
    lock = path.with_name(f"{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    token = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "id": uuid4().hex})
    if not _take(lock, token):
        yield False
        return
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(lock, ended), daemon=True)
    renewal.start()
    try:
        yield True
    finally:
        ended.set()
        renewal.join()
        if _read(lock) == token:
            lock.unlink(missing_ok=True)


def _take(lock: Path, token: str) -> bool:
    own = lock.with_name(f"{lock.name}.{uuid4().hex}")
    try:
        write_whole(own, lambda partial: partial.write_text(token))
        for _ in range(2):
            with suppress(FileExistsError):
                _publish(own, lock)
                return True
            found = _read(lock)
            if found is None:  # released just now
                continue
            if not _is_stale(lock, found):
                return False
            _remove(lock, found)
        return False
    finally:
        own.unlink(missing_ok=True)


def _publish(own: Path, lock: Path) -> None:
    """Makes the lock, with the content of `own`.

    Raises:
        FileExistsError: There is a lock.
    """
    # A link is made in one step together with its content.
    try:
        os.link(own, lock)
    except OSError as error:
        if error.errno not in _WITHOUT_LINKS:
            raise
        # A process that is killed before it writes leaves an empty file, which expires.
        with lock.open("x", encoding="utf-8") as file:
            file.write(own.read_text(encoding="utf-8", errors="replace"))


def _remove(lock: Path, stale: str) -> None:
    """Removes a stale lock. If another process replaced the lock in the meantime, puts the new lock back."""
    aside = lock.with_name(f"{lock.name}.{uuid4().hex}")
    with suppress(FileNotFoundError):
        lock.rename(aside)
        if _read(aside) != stale:
            with suppress(FileExistsError):
                _publish(aside, lock)
        aside.unlink(missing_ok=True)


def _is_stale(lock: Path, text: str) -> bool:
    try:
        age = time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return True
    try:
        owner = json.loads(text)
        here, process = owner["host"] == socket.gethostname(), int(owner["process"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return age > EXPIRY
    return age > EXPIRY or (here and not _is_running(process))


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # a process of another user; a number that no process can have
        return True
    return True


def _read(lock: Path) -> str | None:
    try:
        return lock.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None


def _renew(lock: Path, ended: threading.Event) -> None:
    while not ended.wait(_RENEWAL):
        with suppress(OSError):  # the next renewal may succeed, for example on a network drive
            os.utime(lock)
