"""grouped_mlp: the experts' two-layer MLPs, all at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers.ops._checks import check_device, check_floating, check_shape, check_tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh form, as the reference's models have it."""
    return F.gelu(x, approximate="tanh")


def grouped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    act: Callable[[Tensor], Tensor] = gelu_tanh,
) -> Tensor:
    """``act(x w1 + b1) w2 + b2``, one MLP per expert.

    Two batched products: torch's are at the machine's limit for equal row counts,
    and slots are equal by construction.

    Args:
        x: [E, N, D] floating point, N rows for each expert.
        w1, b1: [E, D, F] and [E, F] (or None).
        w2, b2: [E, F, D'] and [E, D'] (or None).
        act: elementwise, GELU in its tanh form by default.

    Returns:
        [E, N, D'], x's dtype.

    Raises:
        TypeError, ValueError: a wrong shape, dtype or device.
    """
    x = check_floating("grouped_mlp", "x", check_tensor("grouped_mlp", "x", x, "E N D"))
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
    for name, value in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        if value is not None:
            check_device("grouped_mlp", name, value, "x", x)
            if value.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise TypeError(f"grouped_mlp: {name} is {value.dtype} and x {x.dtype}")
    return _affine(act(_affine(x, w1, b1)), w2, b2)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)
