"""Checks the Triton peers of all cases on the CPU. test_cases.py runs it with TRITON_INTERPRET=1, which must be set
before Triton is imported.
"""

from dataclasses import replace

import torch

from benchmarks.case import FORWARD, Size
from benchmarks.cases import entries
from benchmarks.compare import applies, check
from benchmarks.peers import packages

SIZE = Size(images=2, tokens=48, experts=4, width=300)  # the last block of each axis is not full

packages.runs_triton = lambda device: True
found = []
for entry in entries(device="cuda"):
    if entry.op not in ("topk", "dispatch"):
        continue
    for size in (SIZE, replace(SIZE, top_k=1), replace(SIZE, images=1, tokens=50, dtype="bfloat16")):
        torch.manual_seed(0)
        case = entry.build(size, "cpu")
        mine = [variant for variant in case.variants if variant.name == "triton" and applies(variant, FORWARD)]
        assert len(mine) == 1, (case.title, case.skipped)
        with torch.no_grad():
            check(case, mine[0], FORWARD)
        found.append(case.title)
print(len(found), "checked")
