"""grouped_mlp: the experts' two-layer MLPs, all at once."""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.ops._autograd import call, refuse_second_derivative
from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import compute_dtype, product_dtype

check = Check("grouped_mlp")

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
    """``act(x w1 + b1) w2 + b2``, one MLP per expert, over its filled rows.

    On a CPU the op visits the filled rows alone, and bias, activation and their gradient cost no pass over memory. On
    CUDA they are one pass between torch's batched products over all rows, whose number the host knows: nothing waits
    for the device. `vmoe_routers.Experts` serves every other dtype, activation and transform.

    Args:
        x: [E, N, D], N rows for each expert; float32 or float64, on CUDA also float16 or bfloat16.
        w1, b1: [E, D, F] and [E, F] (or None), in x's dtype.
        w2, b2: [E, F, D'] and [E, D'] (or None), in x's dtype.
        act: "gelu_tanh" or "gelu" (the exact form).
        filled: [E, G] int32: an expert's rows are G segments of N / G, and the first ``filled[e, g]`` rows of a
            segment are filled. None: all rows are. The other rows must be finite, and are not used.

    Returns:
        [E, N, D'], x's dtype. Rows that are not filled are zeros, and have no gradient.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or `act`.
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
    """Whether there is a kernel for the device and dtype of `x`."""
    return x.device.type in ("cpu", "cuda") and product_dtype(x, compute_dtype(x.dtype)) == x.dtype


def grouped_mlp_unchecked(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, act: str, filled: Tensor | None
) -> Tensor:
    """`grouped_mlp` of arguments known to be right."""
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w1, b1, w2, b2))
    return call(torch.ops.vmoe_routers.grouped_mlp.default, x, w1, b1, w2, b2, filled, act, save)[0]


def check_filled(check: Check, filled: Tensor, x: Tensor) -> None:
    """filled [E, G] int32 beside rows x [E, N, D], N a multiple of G."""
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


def _setup_context(ctx, inputs, output):
    x, w1, b1, w2, _, filled, ctx.act, _ = inputs
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.save_for_backward(x, w1, b1, w2, filled, hidden)


def _backward(ctx, grad, _):
    x, w1, b1, w2, filled, hidden = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    of_x, of_weights = wanted[0], any(wanted[1:5])
    grads = torch.ops.vmoe_routers.grouped_mlp_backward(grad, x, w1, b1, w2, filled, hidden, ctx.act, of_x, of_weights)
    return *(value if want else None for value, want in zip(grads, wanted, strict=False)), None, None, None


torch.library.register_autograd("vmoe_routers::grouped_mlp", _backward, setup_context=_setup_context)
refuse_second_derivative("grouped_mlp_backward")
