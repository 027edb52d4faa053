"""Memory: bytes that autograd keeps for the backward, and the peak of a process that runs a variant once."""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.case import Variant


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


def peak_in_child(op: str, index: int, name: str, size: dict, threads: int, direction: str) -> int | None:
    """`peak_bytes` of one run in a fresh process, or None where it cannot be told."""
    request = {"op": op, "index": index, "name": name, "size": size, "threads": threads, "direction": direction}
    command = [sys.executable, "-m", "benchmarks.memory", json.dumps(request)]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def main() -> None:
    from benchmarks.case import Size
    from benchmarks.cases import entries
    from benchmarks.compare import runner

    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    entry, size = entries(request["op"])[request["index"]], Size(**request["size"])

    def prepare(size: Size):
        case = entry.build(size, "cpu")
        return runner(next(v for v in case.variants if v.name == request["name"]), request["direction"])

    prepare(replace(size, images=1))()  # the libraries' own buffers and threads
    print(peak_bytes(prepare(size)))


if __name__ == "__main__":
    main()
