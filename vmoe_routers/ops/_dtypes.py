"""Dtypes that kernels take and compute in, and masked values."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

HALF_PRODUCTS = frozenset({"cuda"})
"""Device types whose matrix products accept 16-bit inputs."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Gives the dtype that a kernel computes in: float64 for float64, float32 for every other dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts `x` to this dtype."""
    # Compare first: a `to` without effect takes as long as a sum of two small tensors.
    return x if x.dtype == dtype else x.to(dtype)


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Gives the dtype of the factor `x` of a product that adds in `dtype`: 16 bits if the device accepts 16 bits."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.dtype if half and x.device.type in HALF_PRODUCTS and dtype == torch.float32 else dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Gives a context without autocast on the device of `x`."""
    # torch.autocast refuses the meta device, and its construction takes microseconds.
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def fill_masked(x: Tensor, mask: Tensor | None, value: float = -math.inf) -> Tensor:
    """Fills the rows of masked tokens in `x` [G, T, ...] with `value`. -inf marks a masked entry in every op."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), value)
