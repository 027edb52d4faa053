"""The cases of the benchmark: every module has a list `ENTRIES`."""

from __future__ import annotations

from benchmarks.case import Entry
from benchmarks.cases import (
    assign_slots,
    dispatch,
    expert_choice,
    grouped_mlp,
    invert_slots,
    ksparse_projection,
    ksparse_transport,
    layer,
    overhead,
    packages,
    sinkhorn,
    soft_mix,
    topk,
)

MODULES = (
    topk,
    expert_choice,
    assign_slots,
    invert_slots,
    sinkhorn,
    ksparse_projection,
    ksparse_transport,
    dispatch,
    grouped_mlp,
    soft_mix,
    layer,
    packages,
    overhead,
)
OPS = tuple(dict.fromkeys(entry.op for module in MODULES for entry in module.ENTRIES))


def entries(op: str | None = None, device: str = "cpu") -> list[Entry]:
    """Returns the entries that are measured on the device, of all ops or of one."""
    every = [entry for module in MODULES for entry in module.ENTRIES if op in (None, entry.op)]
    return [entry for entry in every if device == "cuda" or not entry.only_cuda]
