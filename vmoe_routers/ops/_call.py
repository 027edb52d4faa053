"""How the public functions call the ops behind them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch._ops import OpOverload

_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def call(op: OpOverload, *args: object) -> Any:
    """``op(*args)``, where nothing is recorded for a gradient past autograd's layer of the dispatcher."""
    # That layer is written in Python, and takes as long as the rest of a small call.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with _below_autograd():
        return op(*args)
