"""The cases, by op: `ENTRIES` of each module, as data."""

from __future__ import annotations

from benchmarks.case import Entry
from benchmarks.cases import (
    assign_slots,
    dispatch,
    expert_choice,
    grouped_mlp,
    ksparse_transport,
    layer,
    sinkhorn,
    soft_mix,
    topk,
)

MODULES = (topk, expert_choice, assign_slots, sinkhorn, ksparse_transport, dispatch, grouped_mlp, soft_mix, layer)
OPS = tuple(module.ENTRIES[0].op for module in MODULES)


def entries(op: str | None = None) -> list[Entry]:
    """All entries, or those of one op."""
    return [entry for module in MODULES for entry in module.ENTRIES if op in (None, entry.op)]
