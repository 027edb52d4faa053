"""Measures memory: bytes that autograd saves for backward, and the peak of a process that runs a variant once."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.case import Entry, Size, Variant
from benchmarks.compare import applies, recording, runner


def saved_bytes(variant: Variant) -> int:
    """Returns the bytes of the storages saved for backward, without the leaves. Each storage counts once."""
    own = {leaf.untyped_storage().data_ptr() for leaf in variant.leaves}
    storages: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer not in own:
            storages[pointer] = x  # keeps the storage alive: a new storage could get the address of a freed storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = variant.call()
    del outputs
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]


def peak_bytes(run) -> int:
    """Returns how much the peak of resident memory grows while `run` runs (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise `run` reuses freed memory, and the peak does not grow
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return max(0, _status("VmHWM") - before)


def peaks(op: str, index: int, size: Size, threads: int) -> dict[str, int]:
    """Returns `peak_bytes` by "name, direction" of a case, measured in a new process; empty if the process fails."""
    request = {"op": op, "index": index, "size": asdict(size), "threads": threads}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(request)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def main() -> None:
    """Forks once per variant and direction, before any thread starts, so that no variant reuses memory of another."""
    from benchmarks.cases import entries

    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    entry, size = entries(request["op"])[request["index"]], Size(**request["size"])
    entry.build(replace(size, images=1), "cpu")  # imports packages once, for all forks
    number = 0
    while _in_child(lambda: _print_peak(entry, size, number)):  # noqa: B023
        number += 1


def _in_child(work: Callable[[], bool]) -> bool:
    """Runs `work` in a fork of this process. Returns the result of `work`, or False after an exception."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(Exception):
            code = 0 if work() else 1
        sys.stdout.flush()
        os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def _print_peak(entry: Entry, size: Size, number: int) -> bool:
    """Prints the peak of the `number`-th pair of variant and direction. Returns False if there are fewer pairs."""

    def prepare(size: Size):
        torch.manual_seed(0)
        case = entry.build(size, "cpu")
        every = [(v, d) for d in case.floors for v in case.variants if applies(v, d)]
        return every[number : number + 1]

    for small in prepare(replace(size, images=1)):
        with recording(small[1]):
            runner(*small)()  # allocates buffers and threads of the libraries
    for variant, direction in prepare(size):
        call = runner(variant, direction)
        with recording(direction):
            print(json.dumps([f"{variant.name}, {direction}", peak_bytes(call)]))
        return True
    return False


if __name__ == "__main__":
    main()
