"""Calls every op with hostile arguments and reports the calls that ended the process or ran too long.

`test_hostile.py` runs this file as a program. The program prints JSON: for every op the number of calls and the fatal
calls. An exception is a correct result. A forked process runs a batch of calls. After a fatal call, another process
continues with the next call. Tensors begin or end at pages without access, so that a read out of bounds by one entry is
fatal.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import mmap
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoe_routers import ops

raw = torch.ops.vmoe_routers
G, T, E, C, K, D = 2, 5, 3, 4, 2, 6

INTS = [-(2**63), -(2**31), -1, 0, 1, 2, 7, 100, 10**6, 2**31 - 1, 2**31, 2**33 + 1, 2**62, 2**63 - 1]
INT32 = [-(2**31), -(10**6), -1, 0, 1, 2, 11, 12, 13, 100, 10**6, 2**31 - 1]
FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-30, 1e30]
DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.cfloat]
# The largest number of iterations of a call. Larger numbers are valid, but take longer.
LONG = {"iterations": 10**3}
CPU_SECONDS = 5
LIBC = ctypes.CDLL(None)
MEMORY = 2 << 30


def floats(*shape: int) -> Tensor:
    return torch.randn(shape)


def ints(*shape: int, below: int) -> Tensor:
    return torch.randint(-1, below, shape, dtype=torch.int32)


def lists() -> list[Tensor]:
    """Returns token, and the offsets and slots that `invert_slots` computes from it."""
    token = ints(G, E, C, below=T)
    return [token, *ops.invert_slots(token, T)[:2]]


def mlp(*, public: bool = False) -> list[Any]:
    weights = [floats(E, G * C, D), floats(E, D, 7), floats(E, 7), floats(E, 7, D), floats(E, D)]
    filled = torch.full((E, G), C - 1, dtype=torch.int32)
    return [*weights, "gelu_tanh", filled] if public else [*weights, filled, "gelu_tanh", True]


def sinkhorn_backward() -> list[Any]:
    steps = torch.full((G,), 3, dtype=torch.int32)
    return [floats(G, T, E), floats(G, T, E), floats(G, 3, E).double(), steps, 1.0]


def gather_backward(dim: int) -> list[Any]:
    rows, places = (T, E) if dim == 2 else (E, T)
    picks = [floats(G, rows, K), floats(G, rows, K)]
    return [*picks, floats(G, T, E), ints(G, rows, K, below=places), floats(2, G, T), dim]


def mlp_backward() -> list[Any]:
    x, w1, b1, w2, _, filled, act, _ = mlp()
    return [floats(E, G * C, D), x, w1, b1, w2, filled, floats(E, G * C, 7), act, True, True]


# Valid arguments of every raw op and every public op. The test fails if an op has no row.
ROWS: dict[str, list[Callable[[], list[Any]]]] = {
    "raw.topk": [lambda: [floats(G, T, E), 2, 1]],
    "raw.softmax_gather": [
        lambda: [floats(G, T, E), ints(G, T, K, below=E), 2],
        lambda: [floats(G, T, E), ints(G, E, K, below=T), 1],
    ],
    "raw.softmax_gather_backward": [lambda: gather_backward(2), lambda: gather_backward(1)],
    "raw.softmax_topk": [lambda: [floats(G, T, E), 2, 2], lambda: [floats(G, T, E), 2, 1]],
    "raw.assign_slots": [lambda: [ints(G, T, K, below=E), floats(G, T), E, C]],
    "raw.invert_slots": [lambda: [ints(G, E, C, below=T), T]],
    "raw.dispatch": [lambda: [floats(G, T, D), *lists()]],
    "raw.combine": [lambda: [floats(E, G, C, D), floats(G, E, C), *lists()]],
    "raw.combine_backward": [lambda: [floats(G, T, D), floats(E, G, C, D), floats(G, E, C), lists()[0]]],
    "raw.sinkhorn": [lambda: [floats(G, T, E), 1.0, 4, 1e-3, False]],
    "raw.sinkhorn_backward": [sinkhorn_backward],
    "raw.sinkhorn_implicit_backward": [lambda: [floats(G, T, E), floats(G, T, E).softmax(2), 1.0]],
    "raw.ksparse_projection": [lambda: [floats(G, T), 2]],
    "raw.ksparse_projection_backward": [lambda: [floats(G, T, E), floats(G, T, E).relu()]],
    "raw.ksparse_transport": [lambda: [floats(G, T, E), 2, 4, "adam", 0.01, 1e-3, 1.0]],
    "raw.soft_logits": [lambda: [floats(G, T, D), floats(D, E * C)]],
    "raw.soft_logits_backward": [lambda: [floats(G, T, E * C), floats(G, T, D), floats(D, E * C)]],
    "raw.soft_mix": [
        lambda: [floats(G, T, E * C), floats(G, T, D), 1, E],
        lambda: [floats(G, T, E * C), floats(E, G, C, D), 2, E],
    ],
    "raw.soft_mix_backward": [
        lambda: [floats(E, G, C, D), floats(G, T, E * C), floats(G, T, D), 1, E],
        lambda: [floats(G, T, D), floats(G, T, E * C), floats(E, G, C, D), 2, E],
    ],
    "raw.grouped_mlp": [mlp],
    "raw.grouped_mlp_backward": [mlp_backward],
    "ops.topk": [lambda: [floats(G, T, E), 2, 1]],
    "ops.softmax_gather": [lambda: [floats(G, T, E), ints(G, T, K, below=E), 2]],
    "ops.softmax_topk": [lambda: [floats(G, T, E), 2, 1]],
    "ops.assign_slots": [lambda: [ints(G, T, K, below=E), E, C, floats(G, T)]],
    "ops.invert_slots": [lambda: [ints(G, E, C, below=T), T]],
    "ops.dispatch": [lambda: [floats(G, T, D), *lists()]],
    "ops.combine": [lambda: [floats(E, G, C, D), floats(G, E, C), *lists()]],
    "ops.sinkhorn": [lambda: [floats(G, T, E)]],
    "ops.ksparse_projection": [lambda: [floats(G, T), 2]],
    "ops.ksparse_transport": [lambda: [floats(G, T, E), 2]],
    "ops.soft_logits": [lambda: [floats(G, T, D), floats(D, E * C)]],
    "ops.soft_mix": [
        lambda: [floats(G, T, E * C), floats(G, T, D), 1, E],
        lambda: [floats(G, T, E * C), floats(E, G, C, D), 2],
    ],
    "ops.grouped_mlp": [lambda: mlp(public=True)],
}
# Keyword-only integers of public functions.
KEYWORDS: dict[str, dict[str, Any]] = {
    "ops.sinkhorn": {"iterations": 4},
    "ops.ksparse_transport": {"iterations": 4},
}


def hostile(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Hostile values to pass instead of `value`, each with a description."""
    if isinstance(value, bool):
        yield "not", not value
    elif isinstance(value, int):
        yield from ((str(v), v) for v in INTS if v <= LONG.get(name, 2**63))
    elif isinstance(value, float):
        yield from ((str(v), v) for v in FLOATS)
    elif isinstance(value, str):
        yield from ((repr(v), v) for v in ("", "lbfgs", "gelu", "no such"))
    elif isinstance(value, Tensor):
        yield "None", None
        yield from shapes(value)
        yield from ((str(dtype), value.to(dtype)) for dtype in DTYPES)
        yield "on meta", value.to("meta")
        wide = value.new_empty([2 * size for size in value.shape])
        yield "strided", wide[tuple(slice(None, None, 2) for _ in value.shape)].copy_(value)
        if is_list(value):
            yield from entries(value)
        else:
            yield from ((f"all {v}", torch.full_like(value, v)) for v in FLOATS)


def shapes(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "without its first axis", value[0]
    yield "with one axis more", value[None]
    yield "without axes", value.new_zeros(())
    for axis, size in enumerate(value.shape):
        yield f"empty along {axis}", value.narrow(axis, 0, 0).contiguous()
        yield f"one less along {axis}", value.narrow(axis, 0, size - 1).contiguous()
        yield f"one more along {axis}", torch.cat([value, value.narrow(axis, 0, 1)], axis)
        for huge, other in itertools.product((2**31, 2**62), range(value.ndim)):
            if other != axis:
                sizes = [*value.shape]
                sizes[axis], sizes[other] = huge, 0
                with contextlib.suppress(RuntimeError):  # torch refuses some of these sizes itself
                    strides = [1] * value.ndim  # the size of a packed tensor would overflow
                    bad = torch.empty_strided(sizes, strides, dtype=value.dtype)
                    yield f"{huge} along {axis}, empty along {other}", bad
        yield f"expanded along {axis}", value.narrow(axis, 0, 1).expand_as(value)


def entries(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    for v in INT32:
        yield f"all {v}", torch.full_like(value, v)
        for place in (0, value.numel() // 2, value.numel() - 1):
            one = value.clone()
            one.view(-1)[place] = v
            yield f"{v} at {place}", one
    yield "flipped", value.flip(value.ndim - 1)
    for seed in range(8):
        yield f"mixed {seed}", mixed(value, torch.Generator().manual_seed(seed))


def is_list(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int32


def mixed(value: Tensor, generator: torch.Generator) -> Tensor:
    picks = torch.randint(len(INT32), value.shape, generator=generator)
    return torch.tensor(INT32, dtype=torch.int32)[picks]


def guarded(value: Any, at_end: bool) -> Any:
    """Copies a packed tensor to memory that begins right after, or ends right before, a page without access."""
    if not isinstance(value, Tensor) or not value.is_contiguous() or value.numel() == 0 or value.is_meta:
        return value
    size, page = value.numel() * value.element_size(), mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (begin, begin + (pages + 1) * page):
        assert LIBC.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    copy = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=offset).view(value.shape)
    return copy.copy_(value)


def cases(name: str) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    for row, good in enumerate(ROWS[name]):
        torch.manual_seed(0)
        arguments = good()
        keywords = KEYWORDS.get(name, {})
        names = parameter_names(name)
        yield f"{row}: good", arguments, keywords
        for at, value in enumerate(arguments):
            for words, bad in hostile(value, names[at]):
                changed = [*arguments[:at], bad, *arguments[at + 1 :]]
                yield f"{row}: {names[at]} {words}", changed, keywords
        for key, value in keywords.items():
            for words, bad in hostile(value, key):
                yield f"{row}: {key} {words}", arguments, {**keywords, key: bad}
        # Combine lists that contradict each other.
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)

            lists_mixed = [mixed(a, generator) if is_list(a) else a for a in arguments]
            yield f"{row}: all lists mixed {seed}", lists_mixed, keywords


def parameter_names(name: str) -> list[str]:
    space, op = name.split(".")
    if space == "raw":
        return [argument.name for argument in getattr(raw, op).default._schema.arguments]
    function = getattr(ops, op)
    return list(function.__code__.co_varnames[: function.__code__.co_argcount])


def call(name: str, arguments: list[Any], keywords: dict[str, Any]) -> None:
    """Calls the op and, if the op has one, its backward. An exception is a correct result."""
    space, op = name.split(".")
    function = getattr(raw, op).default if space == "raw" else getattr(ops, op)
    for at_end in (True, False):
        placed = [guarded(a, at_end) for a in arguments]
        for a in placed:
            if isinstance(a, Tensor) and a.is_leaf and a.dtype in (torch.float32, torch.float64):
                a.requires_grad_()
        try:
            results = function(*placed, **keywords)
            results = results if isinstance(results, tuple) else (results,)
            total = sum(r.double().sum() for r in results if r.requires_grad)
            if isinstance(total, Tensor):
                total.backward()
        except Exception:
            pass


def run(name: str) -> dict[str, Any]:
    progress = mmap.mmap(-1, 8)
    listed = list(cases(name))
    fatal, start = [], 0
    while start < len(listed) and len(fatal) < 40:
        child = os.fork()
        if child == 0:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            for at in range(start, len(listed)):
                progress[:8] = at.to_bytes(8, "little")
                signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
                call(name, *listed[at][1:])
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            break
        at = int.from_bytes(progress[:8], "little")
        why = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        fatal.append(f"{listed[at][0]}: {why}")
        start = at + 1
    return {"calls": len(listed), "fatal": fatal}


def main(library: str | None, names: list[str]) -> None:
    torch.set_num_threads(1)  # the children of a fork have no other threads
    if library:
        torch.ops.load_library(library)
    call("raw.topk", [torch.empty(1, 1, device="meta"), 1, 0], {})  # imports modules before the children need them
    json.dump({name: run(name) for name in names or ROWS}, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1] or None, sys.argv[2:])
