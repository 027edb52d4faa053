"""grouped_mlp: the two-layer MLPs of all experts in one call."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vmoe_routers.ops._autograd import call, refuse_second_derivative, register_gradient
from vmoe_routers.ops._checks import Check, tracing
from vmoe_routers.ops._dtypes import compute_dtype, product_dtype

check: Check = Check("grouped_mlp")

ACTIVATIONS = ("gelu_tanh", "gelu")


def grouped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str = "gelu_tanh",
    filled: Tensor | None = None,
) -> Tensor:
    """Computes ``act(x w1 + b1) w2 + b2``, one MLP per expert, for the filled rows.

    CPU kernels compute only the filled rows, and fuse bias, activation and their gradient into the matrix products.
    CUDA kernels compute bias and activation in one pass between torch's batched products over all rows, so the host
    never waits for the device. `vmoe_routers.Experts` supports every other dtype, activation and transform.

    Args:
        x: [E, N, D], N rows per expert. The dtype is float32 or float64, on CUDA also float16 or bfloat16.
        w1, b1: [E, D, F] and [E, F] (or None), in x's dtype.
        w2, b2: [E, F, D'] and [E, D'] (or None), in x's dtype.
        act: "gelu_tanh" or "gelu" (the exact form).
        filled: [E, G] int32. The rows of an expert form G segments of N / G rows. The first ``filled[e, g]`` rows of
            segment g are filled. Empty rows must be finite and are ignored. None means that all rows are filled.

    Returns:
        [E, N, D'] in x's dtype. Empty rows are zeros and have no gradient.
    """
    x = check.floating("x", x, "E N D")
    w1 = check.tensor("w1", w1, "E D F")
    w2 = check.tensor("w2", w2, "E F D'")
    experts, width, hidden = x.shape[0], x.shape[2], w1.shape[2]
    check.shape("w1", w1, (experts, width, hidden), "E, D, F")
    check.shape("w2", w2, (experts, hidden, w2.shape[2]), "E, F, D'")
    if b1 is not None:
        check.shape("b1", b1, (experts, hidden), "E, F")
    if b2 is not None:
        check.shape("b2", b2, (experts, w2.shape[2]), "E, D'")
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if value is not None:
            check.device(name, value, "x", x)
            check.dtype(name, value, x.dtype)
    if filled is not None:
        check_filled(check, filled, x)
    check.choice("act", act, ACTIVATIONS)
    if not serves(x):
        raise TypeError(f"grouped_mlp: x must be float32 or float64 on {x.device.type}, got {x.dtype}")
    return grouped_mlp_unchecked(x, w1, b1, w2, b2, act, filled)


def serves(x: Tensor) -> bool:
    """Tells whether a kernel exists for the device and dtype of `x`."""
    return x.device.type in ("cpu", "cuda") and product_dtype(x, compute_dtype(x.dtype)) == x.dtype


def grouped_mlp_unchecked(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, filled: Tensor | None
) -> Tensor:
    """Runs `grouped_mlp` without checks."""
    # A program of torch.jit.trace may run with and without gradients.
    save = tracing() or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2))
    )
    return call(torch.ops.vmoe_routers.grouped_mlp.default, x, w1, b1, w2, b2, filled, act, save)[0]


def check_filled(check: Check, filled: Tensor, x: Tensor) -> None:
    """Checks `filled` [E, G] int32 for rows x [E, N, D], N a multiple of G."""
    check.tensor("filled", filled, "E G")
    check.dtype("filled", filled, torch.int32)
    check.device("filled", filled, "x", x)
    rows, groups = x.shape[1], filled.shape[1]
    check.shape("filled", filled, (x.shape[0], groups), "E, G")
    if rows % groups if groups else rows:
        raise ValueError(f"{check.where}: filled has {groups} segments, which do not divide {rows} rows")


@torch.library.register_fake("vmoe_routers::grouped_mlp")
def _(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    filled: Tensor | None,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    experts, rows, _ = x.shape
    return x.new_empty(experts, rows, w2.shape[2]), x.new_empty(experts, rows if save else 0, w1.shape[2])


@torch.library.register_fake("vmoe_routers::grouped_mlp_backward")
def _(
    grad: Tensor,
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    filled: Tensor | None,
    hidden: Tensor,
    act: str,
    of_x: bool,
    of_weights: bool,
) -> tuple[Tensor, ...]:
    shapes = (w1.shape, w1.shape[::2], w2.shape, w2.shape[::2])
    grad_x = x.new_empty(x.shape if of_x else 0)
    return grad_x, *(x.new_empty(shape if of_weights else 0) for shape in shapes)


# The formulas count empty rows too, as torch's counter does for batched products and `models.cost` for slots.
@register_flop_formula(torch.ops.vmoe_routers.grouped_mlp)
def _(x: torch.Size, w1: torch.Size, b1: object, w2: torch.Size, *_: object, out_shape: object = None) -> int:
    return 2 * x[1] * (w1.numel() + w2.numel())


@register_flop_formula(torch.ops.vmoe_routers.grouped_mlp_backward)
def _(
    grad: torch.Size,
    x: torch.Size,
    w1: torch.Size,
    b1: object,
    w2: torch.Size,
    filled: object,
    hidden: torch.Size,
    act: str,
    of_x: bool,
    of_weights: bool,
    out_shape: object = None,
) -> int:
    # The gradient of the hidden values is always computed.
    return 2 * x[1] * (w2.numel() + of_x * w1.numel() + of_weights * (w1.numel() + w2.numel()))


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, _, filled, ctx.act, _ = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, w1, b1, w2, filled, hidden)


def _backward(ctx, grad, _):
    x, w1, b1, w2, filled, hidden = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    of_x, of_weights = wanted[0], any(wanted[1:5])
    grads = call(
        torch.ops.vmoe_routers.grouped_mlp_backward.default,
        grad,
        x,
        w1,
        b1,
        w2,
        filled,
        hidden,
        ctx.act,
        of_x,
        of_weights,
    )
    return *(value if want else None for value, want in zip(grads, wanted, strict=False)), None, None, None


register_gradient("grouped_mlp", _backward, _setup_context)
refuse_second_derivative("grouped_mlp_backward")
