"""Comparisons of results of any scale with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Relative error of a result, in units of its bound. 16-bit results are computed in float32 and rounded once.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def identical(actual: Tensor, expected: Tensor) -> None:
    """Check equal shapes, dtypes and values; NaN equals NaN."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    assert same.all(), (actual, expected)


def close(actual: Tensor, expected: Tensor, bound: Tensor | float = 1.0, *, slack: float = 1.0) -> None:
    """Check |actual - expected| <= tolerance * slack * bound, NaN and infinity at the same places.

    `bound` is the size of the terms of a sum, such as the result of the reference on absolute values. Entries whose
    bound is a quarter of the largest number of the dtype or more may overflow to anything and are not compared.
    """
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    limits = torch.finfo(actual.dtype)
    a, e = actual.detach().double(), expected.detach().double()
    bound = torch.as_tensor(bound, dtype=torch.float64).expand(e.shape).nan_to_num(nan=0.0)
    compared = ~(bound >= limits.max / 4)
    error = (a - e).abs()
    allowed = TOLERANCE[actual.dtype] * slack * torch.maximum(bound, e.abs()) + 8 * limits.smallest_normal
    fine = (error <= allowed) | (a.isnan() & e.isnan()) | (a == e) | ~compared
    assert fine.all(), (a[~fine][:4], e[~fine][:4], (~fine).nonzero()[:4])


def leaf(x: Tensor) -> Tensor:
    """Gives a leaf that requires grad, in the layout of `x`."""
    return x.detach().requires_grad_()


def exact(x: Tensor) -> Tensor:
    """Gives a float64 leaf of the same values."""
    return x.detach().double().clone().requires_grad_()


def gradients(function: Callable[..., Any], inputs: Sequence[Tensor], cotangent: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns the result of `function` and its gradients for `cotangent`."""
    result = function(*inputs)
    grads = torch.autograd.grad(result, list(inputs), cotangent.to(result.dtype), allow_unused=True)
    return result, [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)]
