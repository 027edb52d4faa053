"""Calls the ops, and refuses derivatives that they lack."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad

_FUNCTIONS: dict[OpOverload, type[torch.autograd.Function]] = {}
"""Gradients in the form that the transforms of torch.func accept."""

_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


def call(op: OpOverload, *args: object) -> Any:
    """Calls the op, skipping the dispatcher's autograd key when no gradient is recorded.

    Raises:
        NotImplementedError: An argument has a tangent of forward-mode AD.
    """
    if forward_ad._current_level >= 0:
        _refuse_tangents(op, args)
    if torch.is_grad_enabled() and torch._C._are_functorch_transforms_active() and op in _FUNCTIONS:
        return _FUNCTIONS[op].apply(*args)
    # Our autograd formulas are written in Python, so the autograd key takes as long as the rest of a small call.
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


def register_gradient(op: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
    """Registers the gradient of an op with the dispatcher, and as a separate function for `torch.func`.

    Args:
        op: Name of the op.
        backward, setup_context: Arguments of `torch.library.register_autograd`.
    """
    torch.library.register_autograd(f"vmoe_routers::{op}", backward, setup_context=setup_context)
    overload = getattr(torch.ops.vmoe_routers, op).default

    class Function(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            with _below_autograd():
                return overload(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if setup_context is not None:
                setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return backward(ctx, *grads)

    _FUNCTIONS[overload] = Function


def refuse_second_derivative(op: str) -> None:
    """Registers a gradient that raises for a backward op.

    Without this gradient, autograd would treat the backward op's result as a constant, and second derivatives would be
    silently wrong.

    Args:
        op: Name of the backward op.
    """

    def backward(ctx: object, *grads: Tensor) -> None:
        raise NotImplementedError(f"vmoe_routers::{op} has no derivative: second derivatives are not supported")

    register_gradient(op, backward)
