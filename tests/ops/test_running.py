"""Ops run from many threads and after a fork, repeat themselves to the bit, and keep no memory."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import hostile
import pytest
import torch
from checks import with_threads
from hostile import KEYWORDS, ROWS
from torch import Tensor

from vmoe_routers import ops

pytestmark = pytest.mark.cpu_kernels
CASES = [(name, row) for name, rows in ROWS.items() for row in range(len(rows))]
# The number of calls of each op that must not keep memory. VMOE_CALLS=20000 sets a larger number, which takes long.
CALLS = int(os.environ.get("VMOE_CALLS", "200"))

each_case = pytest.mark.parametrize(("name", "row"), CASES, ids=[f"{name}-{row}" for name, row in CASES])


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Returns sizes of the arguments that several threads share."""
    for size, value in {"G": 7, "T": 700, "E": 24, "C": 40, "K": 3, "D": 96}.items():
        monkeypatch.setattr(hostile, size, value)


def prepared(name: str, row: int) -> Callable[[], list[Tensor]]:
    """A call of the op, forward and backward, on fixed arguments; gives its results and gradients."""
    torch.manual_seed(0)
    arguments, keywords = ROWS[name][row](), KEYWORDS.get(name, {})
    space, op = name.split(".")
    function = getattr(hostile.raw, op).default if space == "raw" else getattr(ops, op)
    differentiable = space == "ops" or "backward" not in op

    def call() -> list[Tensor]:
        placed = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        leaves = [x for x in placed if isinstance(x, Tensor) and x.is_floating_point()]
        for x in leaves:
            x.requires_grad_(differentiable)
        results = function(*placed, **keywords)
        results = list(results) if isinstance(results, tuple) else [results]
        outputs = [r for r in results if r.requires_grad]
        if not outputs:
            return results
        grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(r) for r in outputs], allow_unused=True)
        return [*(r.detach() for r in results), *(g for g in grads if g is not None)]

    return call


def defined(name: str, results: list[Tensor]) -> list[Tensor]:
    """Returns the results whose entries are all defined. `hidden` of grouped_mlp is left out: it has undefined rows."""
    return [r for at, r in enumerate(results) if not (name == "raw.grouped_mlp" and at == 1)]


def same(name: str, a: list[Tensor], b: list[Tensor]) -> bool:
    pairs = zip(defined(name, a), defined(name, b), strict=True)
    return all(x.shape == y.shape and torch.equal(x.nan_to_num(nan=7), y.nan_to_num(nan=7)) for x, y in pairs)


@each_case
@pytest.mark.parametrize("groups", [1, 7])
def test_equal_in_every_run_and_for_every_number_of_threads(large, monkeypatch, name, row, groups):
    monkeypatch.setattr(hostile, "G", groups)
    call = prepared(name, row)
    first, *others = [*with_threads(call), *with_threads(call)]
    assert all(same(name, first, other) for other in others)


@pytest.mark.parametrize("threads", [1, 2])
def test_calls_from_many_python_threads(threads):
    """Eight threads call all ops at once. Every result equals the result of a single call."""
    calls = {(name, row): prepared(name, row) for name, row in CASES}
    wanted = {case: call() for case, call in calls.items()}
    before = torch.get_num_threads()

    def work(start: int) -> list[str]:
        torch.set_num_threads(threads)
        order = CASES[start:] + CASES[:start]
        return [case[0] for _ in range(5) for case in order if not same(case[0], calls[case](), wanted[case])]

    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(work, range(0, 40, 5))) == [[]] * 8
    finally:
        torch.set_num_threads(before)


def calls_after_fork() -> None:
    """Forks, compares the results of every op in both processes, and exits. The status is 0 if all are equal."""
    calls = {(name, row): prepared(name, row) for name, row in CASES}
    wanted = {case: call() for case, call in calls.items()}
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            status = 0 if all(same(case[0], calls[case](), wanted[case]) for case in CASES) else 2
        finally:
            os._exit(status)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_calls_after_fork():
    """A forked process runs the ops on one thread, as workers of a DataLoader do.

    The test forks a fresh process: without a GPU, torch refuses autograd after a fork of a process that has used fake
    tensors, as torch.compile does.
    """
    script = "import warnings; warnings.simplefilter('ignore'); import test_running; test_running.calls_after_fork()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


class Mallinfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def held() -> tuple[int, int]:
    """Returns the bytes that malloc has allocated, and the number of blocks that Python has allocated."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    gc.collect()
    info = mallinfo()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc")
@each_case
@pytest.mark.usefixtures("one_thread")
def test_calls_keep_no_memory(name, row):
    call = prepared(name, row)

    def growth(calls: int) -> tuple[int, int]:
        before = held()
        for _ in range(calls):
            call()
        return tuple(b - a for a, b in zip(before, held(), strict=True))

    # Ops built with the headers of torch 2.11 leak a copy of every string argument, which the headers never free.
    keeps_texts = torch.__version__.startswith("2.11.") and ("grouped" in name or "transport" in name)
    limit = 192 if keeps_texts else 16
    growth(50)
    # A leak is at least one block per call, of at least 32 bytes in C, in every round. Caches grow in the first round.
    for _ in range(4):
        grown = growth(CALLS)
        if grown[0] < limit * CALLS and grown[1] < CALLS / 2:
            return
    pytest.fail(f"{CALLS} calls keep {grown[0]} bytes of malloc and {grown[1]} blocks of Python")
