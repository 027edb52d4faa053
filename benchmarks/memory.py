"""Memory: bytes that autograd keeps for the backward, and the peak of a process that runs a variant once."""

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
    """Bytes of the storages saved for backward, each counted once, without the leaves."""
    own = {leaf.untyped_storage().data_ptr() for leaf in variant.leaves}
    storages: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        pointer = x.untyped_storage().data_ptr()
        if pointer not in own:
            storages[pointer] = x  # kept alive: a freed address would be taken for an old one
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = variant.call()
    del outputs
    return sum(x.untyped_storage().nbytes() for x in storages.values())


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", text).group(1))  # type: ignore[union-attr]


def peak_bytes(run) -> int:
    """Growth of the resident peak of this process while `run` runs (Linux with glibc)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would be used again unseen
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return max(0, _status("VmHWM") - before)


def peaks(op: str, index: int, size: Size, threads: int) -> dict[str, int]:
    """`peak_bytes` of every variant and direction of a case, "name, direction"; empty where it cannot be told."""
    request = {"op": op, "index": index, "size": asdict(size), "threads": threads}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(request)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def main() -> None:
    """Forks before any thread is started, once per variant and direction, so that none finds another's memory."""
    from benchmarks.cases import entries

    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    entry, size = entries(request["op"])[request["index"]], Size(**request["size"])
    entry.build(replace(size, images=1), "cpu")  # imports the packages, once for all forks
    number = 0
    while _in_child(lambda: _print_peak(entry, size, number)):  # noqa: B023
        number += 1


def _in_child(work: Callable[[], bool]) -> bool:
    """What `work` returns in a fork of this process."""
    child = os.fork()
    if not child:
        code = 1
        with contextlib.suppress(Exception):
            code = 0 if work() else 1
        sys.stdout.flush()
        os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def _print_peak(entry: Entry, size: Size, number: int) -> bool:
    """Runs and prints the peak of one variant in one direction, the `number`-th; False after the last."""

    def prepare(size: Size):
        torch.manual_seed(0)
        case = entry.build(size, "cpu")
        every = [(v, d) for d in case.floors for v in case.variants if applies(v, d)]
        return every[number : number + 1]

    for small in prepare(replace(size, images=1)):
        with recording(small[1]):
            runner(*small)()  # the libraries' own buffers and threads
    for variant, direction in prepare(size):
        call = runner(variant, direction)
        with recording(direction):
            print(json.dumps([f"{variant.name}, {direction}", peak_bytes(call)]))
        return True
    return False


if __name__ == "__main__":
    main()
