"""Experts: the modules that compute the slots of a mixture-of-experts layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import FLOATS, cast
from vmoe_routers.ops.grouped_mlp import grouped_mlp_unchecked, serves

GeluTanh = partial(nn.GELU, approximate="tanh")
"""Makes GELU in its tanh form, the activation of the reference models."""

GELU: dict[str, Callable[[Tensor], Tensor]] = {"gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu}


class Experts(nn.Module):
    """E two-layer MLPs, ``act(x w1 + b1) w2 + b2``, computed at once by `ops.grouped_mlp`.

    That op serves ``nn.GELU`` without dropout (the activation's module is not called then), for the dtypes of its
    kernels, and under CUDA's autocast. Batched products of torch compute every other activation, dropout, 16-bit
    values and autocast on a CPU, and `torch.func` and forward-mode derivatives.

    Args:
        num_experts: E.
        in_features, hidden_features, out_features: D, F and D'.
        act_layer: makes the activation.
        drop: dropout after the activation and after the second layer.
        bias: whether b1 and b2 exist.
        same_init: all experts from one draw, as in the reference's code; by default
            each from its own.

    Attributes:
        w1 [E, D, F], b1 [E, F], w2 [E, F, D'], b2 [E, D']: Xavier uniform, biases 0.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        out_features: int,
        act_layer: Callable[[], nn.Module] = GeluTanh,
        drop: float = 0.0,
        *,
        bias: bool = True,
        same_init: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check = Check("Experts")
        self.num_experts = check.integer("num_experts", num_experts, 1)
        in_features = check.integer("in_features", in_features, 1)
        hidden_features = check.integer("hidden_features", hidden_features, 1)
        out_features = check.integer("out_features", out_features, 1)
        if not callable(act_layer):
            raise TypeError(f"Experts: act_layer must make an activation, as nn.GELU does, got {act_layer!r}")
        bias = check.flag("bias", bias)
        make = partial(torch.empty, device=device, dtype=dtype)
        self.same_init = check.flag("same_init", same_init)
        self.w1 = nn.Parameter(make(num_experts, in_features, hidden_features))
        self.b1 = nn.Parameter(make(num_experts, hidden_features)) if bias else None
        self.w2 = nn.Parameter(make(num_experts, hidden_features, out_features))
        self.b2 = nn.Parameter(make(num_experts, out_features)) if bias else None
        self.act = act_layer()
        self.drop = nn.Dropout(check_drop(check, drop))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights again."""
        for weight in (self.w1, self.w2):
            # Xavier's bound for one expert. One call draws all: a loop would split a sharded parameter.
            bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
            nn.init.uniform_(weight, -bound, bound)
            if self.same_init:
                with torch.no_grad():
                    weight[1:] = weight[0]
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, filled: Tensor | None = None) -> Tensor:
        """Maps slots x [E, G, C, D] to [E, G, C, D'].

        Computes only the first `filled` [G, E] int32 slots of each buffer; the rest are zeros. None: computes all.
        """
        w1, b1, w2, b2 = self.w1, self.b1, self.w2, self.b2
        check = Check("Experts")
        check.floating("x", x, "E G C D")
        experts, groups, slots, width = x.shape
        check.device("x", x, "w1", w1)
        if (experts, width) != w1.shape[:2]:
            check.shape("x", x, (w1.shape[0], groups, slots, w1.shape[1]), "E, G, C, D")
        if filled is not None:
            check.shape("filled", filled, (groups, experts), "G, E")
            check.dtype("filled", filled, torch.int32)
            check.device("filled", filled, "x", x)
            check.dtype("filled", filled, torch.int32)
            check.device("filled", filled, "x", x)
            filled = filled.t()
        rows = x.reshape(experts, groups * slots, width)
        drops = self.training and self.drop.p > 0
        y = mlp_of_slots(rows, w1, b1, w2, b2, filled, self._act_and_drop if drops else self._activation())
        return (self.drop(y) if drops else y).view(experts, groups, slots, y.shape[2])

    def _activation(self) -> str | Callable[[Tensor], Tensor]:
        act = self.act
        if type(act) is nn.GELU:
            return "gelu_tanh" if act.approximate == "tanh" else "gelu"
        return act

    def _act_and_drop(self, hidden: Tensor) -> Tensor:
        return self.drop(self.act(hidden))

    def extra_repr(self) -> str:
        """Lists the sizes that print(experts) shows."""
        experts, width, hidden = self.w1.shape
        return f"{experts} x ({width} -> {hidden} -> {self.w2.shape[2]})"


class ExpertList(nn.ModuleList):
    """Experts given as modules of any kind, one per expert, which run one after another.

    Args:
        experts: E modules, each from rows [N, D] to rows [N, D'].
    """

    def __init__(self, experts: Sequence[nn.Module]):
        experts = list(experts)
        for expert in experts:
            if not isinstance(expert, nn.Module):
                raise TypeError(f"ExpertList: experts must be nn.Modules, got {type(expert).__name__}")
        if not experts:
            raise ValueError("ExpertList: experts must be at least one module, got none")
        super().__init__(experts)

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return len(self)

    def forward(self, x: Tensor, filled: Tensor | None = None) -> Tensor:
        """Maps slots x [E, G, C, D] to [E, G, C, D']; ignores `filled`: an expert reads empty slots as zeros."""
        rows = x.flatten(1, 2)
        return torch.stack([expert(rows[e]) for e, expert in enumerate(self)]).unflatten(1, x.shape[1:3])


def mlp_of_slots(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    filled: Tensor | None,
    act: str | Callable[[Tensor], Tensor],
) -> Tensor:
    """Computes the MLPs by the op if it has a kernel, else by products; x [E, N, D], filled [E, G]."""
    if not isinstance(act, str):
        return by_products(x, w1, b1, w2, b2, filled, act)
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    if _transformed() or (autocast and device != "cuda"):
        return by_products(x, w1, b1, w2, b2, filled, GELU[act])
    if autocast:
        x, w1, w2 = _autocast(x), _autocast(w1), _autocast(w2)
        b1, b2 = (None if bias is None else _autocast(bias) for bias in (b1, b2))
    if x.dtype != w1.dtype:
        raise TypeError(f"Experts: x must have the experts' dtype {w1.dtype}, got {x.dtype}")
    if serves(x):
        return grouped_mlp_unchecked(x, w1, b1, w2, b2, act, filled)
    return by_products(x, w1, b1, w2, b2, filled, GELU[act])


def by_products(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    filled: Tensor | None,
    act: Callable[[Tensor], Tensor],
) -> Tensor:
    """`ops.grouped_mlp` as two batched products over all rows; rows that are not filled become zeros."""
    y = _affine(act(_affine(x, w1, b1)), w2, b2)
    if filled is None or filled.shape[1] == 0:
        return y
    place = torch.arange(x.shape[1] // filled.shape[1], device=x.device)
    empty = (place >= filled.unsqueeze(2)).flatten(1)
    return y.masked_fill(empty.unsqueeze(2), 0)


def check_drop(check: Check, drop: object) -> float:
    """Checks that `drop` is a dropout rate in [0, 1]."""
    drop = check.number("drop", drop, zero=True)
    if drop > 1:
        raise ValueError(f"{check.where}: drop must be in [0, 1], got {drop}")
    return drop


def _transformed() -> bool:
    """Tells whether a transform of `torch.func` or forward-mode AD is active, which the op does not support."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _autocast(x: Tensor) -> Tensor:
    """Casts `x` as CUDA's autocast casts the inputs of a matrix product."""
    eligible = x.dtype in FLOATS and x.dtype != torch.float64
    return cast(x, torch.get_autocast_dtype("cuda")) if eligible else x


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)
