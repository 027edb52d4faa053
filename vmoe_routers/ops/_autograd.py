"""Calls of the ops, and refusals of the derivatives that they do not have."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def call(op: OpOverload, *args: object) -> Any:
    """Calls the op, skipping the dispatcher's autograd key when no gradient is recorded.

    Raises:
        NotImplementedError: An argument has a tangent of forward-mode AD.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, args)
    # Our autograd formulas are written in Python: the key takes as long as the rest of a small call.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with _below_autograd():
        return op(*args)


def _refuse_tangents(op: OpOverload, args: tuple[object, ...]) -> None:
    # Otherwise torch would call the kernel on the primal values and silently give the result a tangent of 0.
    for parameter, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            name = op._schema.name.removeprefix("vmoe_routers::")
            raise NotImplementedError(
                f"{name}: {parameter.name} has a tangent of forward-mode AD, wanted none: use backward"
            )


def refuse_second_derivative(op: str) -> None:
    """Registers a gradient that raises for a backward op.

    Without this gradient, autograd would treat the backward op's result as a constant, and second derivatives would be
    silently wrong.

    Args:
        op: Name of the backward op.
    """

    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"vmoe_routers::{op} has no derivative: second derivatives are not supported")

    torch.library.register_autograd(f"vmoe_routers::{op}", backward)
