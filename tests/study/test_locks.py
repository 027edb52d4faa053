"""Locks of runs that several processes share."""

import errno
import json
import math
import os
import socket
import subprocess
import sys
import time

import pytest

from vmoe_routers.study import locks
from vmoe_routers.study.locks import locked


@pytest.fixture
def record(tmp_path):
    return tmp_path / "runs" / "soft-seed0.json"


def lock_of(record):
    return record.with_name(record.name + ".lock")


def is_locked(record):
    """Tells whether a lock exists that no process may take over."""
    lock = lock_of(record)
    text = locks._read(lock)
    return text is not None and not locks._is_stale(lock, text)


def test_one_at_a_time(record):
    with locked(record) as first:
        assert first and is_locked(record)
        with locked(record) as second:
            assert not second
        assert is_locked(record)  # leaving the second context does not free the lock of the first
    assert not is_locked(record) and list(record.parent.iterdir()) == []
    with locked(record) as again:
        assert again


def test_a_file_system_without_hard_links(record, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_one_at_a_time(record)
    lock_of(record).write_text("")  # the lock of a process that was killed before it wrote
    with locked(record) as free:
        assert not free
    os.utime(lock_of(record), (0, 0))
    with locked(record) as free:
        assert free and is_locked(record)
    assert list(record.parent.iterdir()) == []


def test_an_error_frees_the_lock(record):
    with pytest.raises(ZeroDivisionError), locked(record):
        raise ZeroDivisionError
    assert not is_locked(record)


def test_a_killed_process_frees_its_lock_on_this_machine(record):
    code = f"""
import os, pathlib, signal
from vmoe_routers.study.locks import locked
with locked(pathlib.Path({str(record)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert lock_of(record).exists() and not is_locked(record)
    with locked(record) as free:
        assert free


HERE = {"host": socket.gethostname(), "id": "x"}


@pytest.mark.parametrize("text", [
    "", "garbage", "[" * 100_000, json.dumps({"host": "another machine", "process": 1, "id": "x"}),
    json.dumps(HERE | {"process": 10**30}), json.dumps(HERE | {"process": math.inf}),
])  # fmt: skip
def test_a_lock_of_another_machine_expires(record, text):
    record.parent.mkdir()
    lock = lock_of(record)
    lock.write_text(text)
    with locked(record) as free:
        assert not free
    old = time.time() - locks.EXPIRY - 1
    os.utime(lock, (old, old))
    assert not is_locked(record)
    with locked(record) as free:
        assert free and json.loads(lock.read_text())["process"] == os.getpid()


def test_a_lock_is_renewed(record, monkeypatch):
    monkeypatch.setattr(locks, "_RENEWAL", 0.01)
    with locked(record):
        os.utime(lock_of(record), (1, 1))
        deadline = time.monotonic() + 120
        while lock_of(record).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lock_of(record).stat().st_mtime > 2


def test_a_lock_that_was_taken_over_is_not_removed(record):
    """A process that slept until its lock expired does not remove the lock of its successor."""
    with locked(record):
        lock_of(record).write_text("of a successor")
    assert lock_of(record).read_text() == "of a successor"


def test_a_fresh_lock_is_put_back(record):
    record.parent.mkdir()
    lock_of(record).write_text("fresh")
    locks._remove(lock_of(record), "stale")
    assert lock_of(record).read_text() == "fresh" and len(list(record.parent.iterdir())) == 1


def test_a_failed_renewal_is_tried_again(record, monkeypatch):
    calls = []

    def fails(path):
        calls.append(path)
        raise PermissionError

    monkeypatch.setattr(locks, "_RENEWAL", 0.001)
    monkeypatch.setattr(locks.os, "utime", fails)
    with locked(record):
        deadline = time.monotonic() + 120
        while len(calls) < 2 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(calls) >= 2
