"""Checks of arguments, in the user's words (who asks, what came, what was wanted), and their preparation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(where: str, name: str, value: object, axes: str) -> Tensor:
    """`value` is a tensor with the axes named, e.g. ``"G T E"``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(value).__name__}")
    if value.ndim != axes.count(" ") + 1:
        wanted = axes.split()
        raise ValueError(
            f"{where}: {name} must have {len(wanted)} axes [{', '.join(wanted)}], got shape {list(value.shape)}"
        )
    return value


def check_floating(where: str, name: str, value: object, *, tangent: bool = False) -> Tensor:
    """`value` is a tensor of float16, bfloat16, float32 or float64; a dual one of forward-mode AD only if `tangent`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{where}: {name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    # torch would pass the kernels by with a tangent of 0.
    if not tangent and forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(f"{where}: {name} has a tangent of forward-mode AD, wanted none: use backward")
    return value


def check_dtype(where: str, name: str, value: Tensor, dtype: torch.dtype) -> None:
    """`value` has this dtype."""
    if value.dtype != dtype:
        raise TypeError(f"{where}: {name} must be {dtype}, got {value.dtype}")


def check_shape(where: str, name: str, value: object, shape: Sequence[int], axes: str) -> None:
    """`value` is a tensor of this shape; `axes` names it in the message, e.g. ``"G, T"``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a Tensor, got {type(value).__name__}")
    if value.shape != tuple(shape):
        raise ValueError(f"{where}: {name} must be [{axes}] = {list(shape)}, got {list(value.shape)}")


def check_device(where: str, name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """`value` is on the device of `other`."""
    if value.device != other.device:
        raise ValueError(f"{where}: {name} is on {value.device} and {other_name} on {other.device}, wanted one device")


def check_int(where: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` is an integer, numpy's among them, ``low <= value <= high``."""
    # int(value) would fix a symbol of torch.compile.
    if not isinstance(value, (int, torch.SymInt)) and isinstance(value, Integral):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{where}: {name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        wanted = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ValueError(f"{where}: {name} must be {wanted}, got {value}")
    return value  # type: ignore[return-value]


def check_positive(where: str, name: str, value: object, *, zero: bool = False) -> float:
    """`value` is a finite number, numpy's among them, > 0, or >= 0 with `zero`."""
    if not isinstance(value, (int, float)) and isinstance(value, Real):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}: {name} must be a number, got {type(value).__name__}")
    # Comparisons alone, false for NaN: under torch.compile(dynamic=True) a float may be a symbol.
    if not 0 <= value < math.inf or (value == 0 and not zero):
        raise ValueError(f"{where}: {name} must be {'>=' if zero else '>'} 0, got {value}")
    return float(value)


def check_choice(where: str, name: str, value: object, choices: Sequence[object]) -> None:
    """`value` is one of `choices`."""
    if value not in choices:
        wanted = ", ".join(map(repr, choices))
        raise ValueError(f"{where}: {name} must be one of {wanted}, got {value!r}")


def check_flag(where: str, name: str, value: object) -> bool:
    """`value` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}: {name} must be a bool, got {type(value).__name__}")
    return value


def check_mask(where: str, mask: object, like_name: str, like: Tensor, axes: str = "G T") -> Tensor:
    """`mask` is a bool tensor [G, T] beside `like` [G, T, ...]."""
    mask = check_tensor(where, "mask", mask, axes)
    check_dtype(where, "mask", mask, torch.bool)
    check_shape(where, "mask", mask, like.shape[:2], axes.replace(" ", ", "))
    check_device(where, "mask", mask, like_name, like)
    return mask


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a kernel computes in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in this dtype."""
    # Asked first: a `to` that does nothing takes as long as a sum of two small tensors.
    return x if x.dtype == dtype else x.to(dtype)


# Where the kernels' products take 16 bits as they are.
HALF_PRODUCTS = {"cuda"}


def product_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which `x` goes into a product whose sums are in `dtype`: its own 16 bits where those are taken."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return x.dtype if half and x.device.type in HALF_PRODUCTS and dtype == torch.float32 else dtype


def without_autocast(x: Tensor) -> AbstractContextManager:
    """A context in which `x` and what is computed from it keep their dtype."""
    # torch.autocast knows no meta device, and takes microseconds to make.
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def fill_absent(x: Tensor, mask: Tensor | None, value: float = -math.inf) -> Tensor:
    """`value`, -inf is the mark of "not there", at the rows of `x` [G, T, ...] that `mask` leaves out."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), value)


def refuse_second_derivative(op: str) -> None:
    """Registers, for a backward op, a gradient that raises.

    Without it autograd would take the backward op's result for a constant and a
    second derivative would come out silently wrong.
    """

    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"vmoe_routers::{op} has no derivative of its own")

    torch.library.register_autograd(f"vmoe_routers::{op}", backward)
