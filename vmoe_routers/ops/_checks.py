"""Checks of arguments. An error names the function, the argument, the wanted value and the given value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, cast

import torch
from torch import Tensor

from vmoe_routers.ops._dtypes import FLOATS
from vmoe_routers.options import did_you_mean


def tracing() -> bool:
    """Tells whether torch.jit.trace runs."""
    return torch.jit.is_tracing()  # type: ignore[attr-defined]


def exporting() -> bool:
    """Tells whether torch.export runs. In torch 2.11, `torch.compiler.is_exporting` is true in torch.compile, too."""
    if hasattr(torch.compiler, "_is_exporting_flag"):
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_exporting()


def traced_size(value: Any) -> Any:
    """Converts a size to an int if torch.jit.trace passes the size as a tensor. Returns any other value unchanged."""
    return int(value) if tracing() and isinstance(value, Tensor) and value.ndim == 0 else value


def larger(a: int, b: int) -> int:
    """Returns the larger of two sizes, which may be symbolic."""
    # torch.compile of torch 2.11 refuses sym_max of two ints, and max of a SymInt would fix its size in an export.
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else cast(int, torch.sym_max(a, b))


def smaller(a: int, b: int) -> int:
    """Returns the smaller of two sizes, which may be symbolic."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else cast(int, torch.sym_min(a, b))


class Check:
    """Checks the arguments of one function or class.

    The function that the user calls checks its tensors. Internal functions do not check them again.

    Args:
        where: Name of the function or class, with which every message begins.
    """

    __slots__ = ("where",)

    def __init__(self, where: str):
        self.where: str = where

    def tensor(self, name: str, value: object, axes: str | None = None) -> Tensor:
        """Checks that `value` is a tensor, and that it has the number of axes in `axes`, such as ``"G T E"``."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{self.where}: {name} must be a Tensor, got {type(value).__name__}")
        if axes is not None and value.ndim != axes.count(" ") + 1:
            wanted = axes.split()
            raise ValueError(
                f"{self.where}: {name} must have {len(wanted)} axes [{', '.join(wanted)}], "
                f"got shape {list(value.shape)}"
            )
        return value

    def floating(self, name: str, value: object, axes: str | None = None) -> Tensor:
        """Checks that `value` is a tensor of float16, bfloat16, float32 or float64, with these axes."""
        value = self.tensor(name, value, axes)
        if value.dtype not in FLOATS:
            raise TypeError(f"{self.where}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
        return value

    def dtype(self, name: str, value: Tensor, dtype: torch.dtype) -> None:
        """Checks that `value` has this dtype."""
        if value.dtype != dtype:
            raise TypeError(f"{self.where}: {name} must be {dtype}, got {value.dtype}")

    def shape(self, name: str, value: object, shape: Sequence[int], axes: str) -> None:
        """Checks that `value` is a tensor of this shape. The message names the shape by `axes`, such as ``"G, T"``."""
        if self.tensor(name, value).shape != tuple(shape):
            got = list(value.shape)  # type: ignore[attr-defined]
            raise ValueError(f"{self.where}: {name} must be [{axes}] = {list(shape)}, got {got}")

    def device(self, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
        """Checks that `value` is on the device of `other`."""
        if value.device != other.device:
            raise ValueError(
                f"{self.where}: {name} is on {value.device} and {other_name} on {other.device}, wanted one device"
            )

    def mask(self, mask: object, like_name: str, like: Tensor, axes: str = "G T") -> Tensor:
        """Checks that `mask` is a bool tensor [G, T] on the device of `like` [G, T, ...]."""
        mask = self.tensor("mask", mask, axes)
        self.dtype("mask", mask, torch.bool)
        self.shape("mask", mask, like.shape[:2], axes.replace(" ", ", "))
        self.device("mask", mask, like_name, like)
        return mask

    def integer(self, name: str, value: object, low: int, high: int | None = None) -> int:
        """Checks that `value` is an integer (also numpy's, or a size in torch.jit.trace), ``low <= value <= high``."""
        value = traced_size(value)
        # A SymInt is not converted: int(value) would specialise a symbolic size of torch.compile.
        if not isinstance(value, (int, torch.SymInt)) and isinstance(value, Integral):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{self.where}: {name} must be an int, got {type(value).__name__}")
        if value < low or (high is not None and value > high):
            wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
            raise ValueError(f"{self.where}: {name} must be {wanted}, got {value}")
        return value  # type: ignore[return-value]

    def number(self, name: str, value: object, *, zero: bool = False) -> float:
        """Checks that `value` is a finite number (also numpy's), > 0, or >= 0 with `zero`."""
        if not isinstance(value, (int, float)) and isinstance(value, Real):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self.where}: {name} must be a number, got {type(value).__name__}")
        # A float may be symbolic under torch.compile(dynamic=True), so use only comparisons, which are false for NaN.
        if not 0 <= value < math.inf or (value == 0 and not zero):
            raise ValueError(f"{self.where}: {name} must be {'>=' if zero else '>'} 0, got {value}")
        return float(value)

    def choice(self, name: str, value: object, choices: Sequence[object]) -> None:
        """Checks that `value` is one of `choices`."""
        if isinstance(value, Tensor) or value not in choices:  # a tensor has no single truth value
            wanted = ", ".join(map(repr, choices))
            meant = did_you_mean(value, [c for c in choices if isinstance(c, str)]) if isinstance(value, str) else ""
            raise ValueError(f"{self.where}: {name} must be one of {wanted}, got {value!r}{meant}")

    def flag(self, name: str, value: object) -> bool:
        """Checks that `value` is a bool."""
        if not isinstance(value, bool):
            raise TypeError(f"{self.where}: {name} must be a bool, got {type(value).__name__}")
        return value
