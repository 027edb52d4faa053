"""grouped_mlp: the experts' two-layer MLPs, all at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers.ops._call import call
from vmoe_routers.ops._checks import (
    FLOATS,
    cast,
    check_choice,
    check_device,
    check_dtype,
    check_floating,
    check_shape,
    check_tensor,
    compute_dtype,
    product_dtype,
    refuse_second_derivative,
)

# Where there is a kernel of ours, for dtypes that its products take as they are.
DEVICES = ("cpu", "cuda")
GELU: dict[str, Callable[[Tensor], Tensor]] = {"gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu}


def grouped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: str | Callable[[Tensor], Tensor] = "gelu_tanh",
    filled: Tensor | None = None,
) -> Tensor:
    """``act(x w1 + b1) w2 + b2``, one MLP per expert, over its filled rows.

    Where `act` is a name it is one op. On a CPU, for float32 and float64, that visits the filled rows alone, and bias,
    activation and their gradient cost no pass over memory. On CUDA, for every dtype and under autocast, they are one
    pass between torch's batched products over all rows, whose number the host knows: nothing waits for the device.
    Everything else (other dtypes and autocast on a CPU, an `act` that is a function, `torch.func` and forward-mode
    derivatives) is torch's batched products and activation.

    Args:
        x: [E, N, D] floating point, N rows for each expert.
        w1, b1: [E, D, F] and [E, F] (or None).
        w2, b2: [E, F, D'] and [E, D'] (or None).
        act: "gelu_tanh", "gelu" (the exact form), or any elementwise function.
        filled: [E, G] int32: an expert's rows are G segments of N / G, and of each this many at its front are
            filled. None: all rows. What is in the others must be finite, and is not used.

    Returns:
        [E, N, D'], x's dtype. Rows that are not filled are zeros, and have no gradient.

    Raises:
        TypeError, ValueError: a wrong shape, dtype, device or `act`.
    """
    x = check_floating("grouped_mlp", "x", check_tensor("grouped_mlp", "x", x, "E N D"), tangent=True)
    w1 = check_tensor("grouped_mlp", "w1", w1, "E D F")
    w2 = check_tensor("grouped_mlp", "w2", w2, "E F D'")
    experts, width, hidden = x.shape[0], x.shape[2], w1.shape[2]
    check_shape("grouped_mlp", "w1", w1, (experts, width, hidden), "E, D, F")
    check_shape("grouped_mlp", "w2", w2, (experts, hidden, w2.shape[2]), "E, F, D'")
    for name, value in (("b1", b1), ("b2", b2)):
        if value is not None:
            weight = w1 if name == "b1" else w2
            check_tensor("grouped_mlp", name, value, "E F" if name == "b1" else "E D'")
            check_shape("grouped_mlp", name, value, (experts, weight.shape[2]), "E, columns")
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    fused = isinstance(act, str) and not _transformed()
    if autocast and fused and device == "cuda":
        x, w1, w2 = _autocast(x), _autocast(w1), _autocast(w2)
        b1, b2 = (None if bias is None else _autocast(bias) for bias in (b1, b2))
        autocast = False
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if value is not None:
            check_device("grouped_mlp", name, value, "x", x)
            if value.dtype != x.dtype and not autocast:
                raise TypeError(f"grouped_mlp: {name} must be {x.dtype} as x is, got {value.dtype}")
    if filled is not None:
        _check_filled(filled, x)
    if isinstance(act, str):
        check_choice("grouped_mlp", "act", act, tuple(GELU))
        served = device in DEVICES and product_dtype(x, compute_dtype(x.dtype)) == x.dtype
        if fused and not autocast and served:
            save = torch.is_grad_enabled() and any(
                value is not None and value.requires_grad for value in (x, w1, b1, w2, b2)
            )
            return call(torch.ops.vmoe_routers.grouped_mlp.default, x, w1, b1, w2, b2, filled, act, save)[0]
        act = GELU[act]
    return by_products(x, w1, b1, w2, b2, filled, act)


def by_products(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    filled: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """`grouped_mlp` as two batched products over all rows, filled or not."""
    y = _affine(act(_affine(x, w1, b1)), w2, b2)
    if filled is None or filled.shape[1] == 0:
        return y
    place = torch.arange(x.shape[1] // filled.shape[1], device=x.device)
    empty = (place >= filled.unsqueeze(2)).flatten(1)
    return y.masked_fill(empty.unsqueeze(2), 0)


def _check_filled(filled: Tensor, x: Tensor) -> None:
    check_tensor("grouped_mlp", "filled", filled, "E G")
    check_dtype("grouped_mlp", "filled", filled, torch.int32)
    check_device("grouped_mlp", "filled", filled, "x", x)
    rows, groups = x.shape[1], filled.shape[1]
    check_shape("grouped_mlp", "filled", filled, (x.shape[0], groups), "E, G")
    if rows % groups if groups else rows:
        raise ValueError(f"grouped_mlp: filled has {groups} segments, which do not divide {rows} rows")


def _transformed() -> bool:
    """Whether derivatives or batches are taken in a way that our kernel's gradient has no rule for."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _autocast(x: Tensor) -> Tensor:
    """`x` as autocast hands it to a product of torch's on CUDA."""
    eligible = x.dtype in FLOATS and x.dtype != torch.float64
    return cast(x, torch.get_autocast_dtype("cuda")) if eligible else x


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)


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
