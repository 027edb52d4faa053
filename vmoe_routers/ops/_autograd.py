"""How the public functions call their ops, and which derivatives are refused."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def call(op: OpOverload, *args: object) -> Any:
    """``op(*args)``, below autograd's layer of the dispatcher where no gradient is recorded.

    Raises:
        NotImplementedError: an argument has a tangent of forward-mode AD.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, args)
    # Autograd's layer is written in Python, and takes as long as the rest of a small call.
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op(*args)
    with _below_autograd():
        return op(*args)


def _refuse_tangents(op: OpOverload, args: tuple[object, ...]) -> None:
    # torch would call the kernel on the primal values and give the result a tangent of 0.
    for parameter, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            name = op._schema.name.removeprefix("vmoe_routers::")
            raise NotImplementedError(
                f"{name}: {parameter.name} has a tangent of forward-mode AD, wanted none: use backward"
            )


def refuse_second_derivative(op: str) -> None:
    """Registers, for a backward op, a gradient that raises.

    Without it autograd would take the backward op's result for a constant, and a
    second derivative would be silently wrong.
    """

    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"vmoe_routers::{op} has no derivative of its own")

    torch.library.register_autograd(f"vmoe_routers::{op}", backward)
