"""Experts: the modules that compute the slots of a mixture-of-experts layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import FLOATS, cast
from vmoe_routers.ops.grouped_mlp import grouped_mlp_unchecked, serves

GeluTanh: Callable[[], nn.Module] = partial(nn.GELU, approximate="tanh")
"""Makes GELU in its tanh form, the activation of the reference models."""

GELU: dict[str, Callable[[Tensor], Tensor]] = {"gelu_tanh": partial(F.gelu, approximate="tanh"), "gelu": F.gelu}


class Experts(nn.Module):
    """E two-layer MLPs, ``act(x w1 + b1) w2 + b2``, computed at once by `ops.grouped_mlp`.

    The op computes experts with ``nn.GELU`` and without dropout, in the dtypes of its kernels and under CUDA's
    autocast. The op does not call the activation module. Two batched products of torch compute all other cases: other
    activations, gated experts, a norm, dropout, 16-bit values and autocast on a CPU, `torch.func` transforms and
    forward-mode derivatives.

    With ``glu=True`` the experts are gated (arXiv 2002.05202): ``(act(x w_gate + b_gate) * (x w_value + b_value)) w2 +
    b2``. This is SwiGLU with ``act_layer=nn.SiLU``. w1 [E, D, 2F] holds w_gate in its first F columns and w_value in
    its last F, and b1 [E, 2F] holds the biases in the same order, as in timm's `SwiGLUPacked`.

    Args:
        num_experts: E.
        in_features, hidden_features, out_features: D, F and D'. F is the input width of w2, for gated experts, too.
        act_layer: Makes the activation.
        drop: Rate of the dropout before and after the second layer. A norm follows the first dropout.
        bias: Whether b1 and b2 exist. A pair of bools sets them separately.
        same_init: Whether all experts start with the same weights, as in the reference's code. By default, every
            expert draws its own weights.
        glu: Whether the experts are gated.
        norm_layer: Makes an ``nn.LayerNorm`` of width F, which is applied before w2 as in timm's `Mlp`. Every expert
            has its own weight and bias. None: no norm.

    Attributes:
        w1, b1, w2, b2: [E, D, F], [E, F], [E, F, D'] and [E, D']. Weights are Xavier uniform (w_gate and w_value
            separately), biases 0. With `glu`, w1 is [E, D, 2F] and b1 [E, 2F].
        norm: An `ExpertsNorm`, or None.
        local: Function set by `distributed.ExpertParallel`, which maps a parameter (a DTensor) to the part of this
            rank.

    Raises:
        TypeError, ValueError: An argument is out of range.
    """

    local: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        out_features: int,
        act_layer: Callable[[], nn.Module] = GeluTanh,
        drop: float = 0.0,
        *,
        bias: bool | Sequence[bool] = True,
        same_init: bool = False,
        glu: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check = Check("Experts")
        self.num_experts: int = check.integer("num_experts", num_experts, 1)
        in_features = check.integer("in_features", in_features, 1)
        hidden_features = check.integer("hidden_features", hidden_features, 1)
        out_features = check.integer("out_features", out_features, 1)
        if not callable(act_layer):
            raise TypeError(f"Experts: act_layer must make an activation, as nn.GELU does, got {act_layer!r}")
        first_bias, second_bias = _biases(check, bias)
        make = partial(torch.empty, device=device, dtype=dtype)
        self.same_init: bool = check.flag("same_init", same_init)
        self.glu: bool = check.flag("glu", glu)
        first_features = 2 * hidden_features if glu else hidden_features
        self.w1: nn.Parameter = nn.Parameter(make(num_experts, in_features, first_features))
        self.b1: nn.Parameter | None = nn.Parameter(make(num_experts, first_features)) if first_bias else None
        self.w2: nn.Parameter = nn.Parameter(make(num_experts, hidden_features, out_features))
        self.b2: nn.Parameter | None = nn.Parameter(make(num_experts, out_features)) if second_bias else None
        self.act: nn.Module = act_layer()
        self.drop: nn.Dropout = nn.Dropout(check_drop(check, drop))
        norm = None if norm_layer is None else norm_layer(hidden_features, device=device, dtype=dtype)
        if norm is not None and not isinstance(norm, nn.LayerNorm):
            raise TypeError(f"Experts: norm_layer must make an nn.LayerNorm, got {type(norm).__name__}")
        self.norm: ExpertsNorm | None = None if norm is None else ExpertsNorm(num_experts, norm)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights again."""
        hidden = self.w2.shape[1]
        for weight, features in ((self.w1, self.w1.shape[1]), (self.w2, self.w2.shape[2])):
            # Xavier's bound for one matrix [D, F] of an expert. The w1 of a gated expert has two. One call draws all
            # experts, because a loop would split a sharded parameter.
            bound = math.sqrt(6 / (features + hidden))
            nn.init.uniform_(weight, -bound, bound)
            if self.same_init:
                with torch.no_grad():
                    weight[1:] = weight[0]
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)
        if self.norm is not None:
            self.norm.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names biases and norms, which optimizers should not decay, although they have two axes."""
        return {name for name, _ in self.named_parameters() if name not in ("w1", "w2")}

    def forward(self, x: Tensor, filled: Tensor | None = None) -> Tensor:
        """Maps slots x [E, G, C, D] to [E, G, C, D'].

        Computes only the first `filled` [G, E] int32 slots of each buffer. All other slots are zeros. None computes
        all slots. Under expert parallelism E is the number of experts of this rank.
        """
        w1, b1, w2, b2 = _on_this_rank(self, self.w1, self.b1, self.w2, self.b2)
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
            filled = filled.t()
        rows = x.reshape(experts, groups * slots, width)
        drops = self.training and self.drop.p > 0
        more = drops or self.glu or self.norm is not None
        y = mlp_of_slots(rows, w1, b1, w2, b2, filled, self._between if more else self._activation())
        return (self.drop(y) if drops else y).view(experts, groups, slots, y.shape[2])

    def _activation(self) -> str | Callable[[Tensor], Tensor]:
        act = self.act
        if type(act) is nn.GELU:
            return "gelu_tanh" if act.approximate == "tanh" else "gelu"
        return act

    def _between(self, hidden: Tensor) -> Tensor:
        """Computes activation, gate, dropout and norm between the two products, for cases without a kernel."""
        if self.glu:
            gate, value = hidden.chunk(2, dim=-1)
            hidden = self.act(gate) * value
        else:
            hidden = self.act(hidden)
        hidden = self.drop(hidden)
        return hidden if self.norm is None else self.norm(hidden)

    def extra_repr(self) -> str:
        """Lists the sizes that print(experts) shows."""
        experts, hidden, out = self.w2.shape
        return f"{experts} x ({self.w1.shape[1]} -> {hidden} -> {out}{', gated' if self.glu else ''})"


class ExpertsNorm(nn.Module):
    """LayerNorm of the hidden values, with a weight and a bias of each expert.

    Args:
        num_experts: E.
        norm: An ``nn.LayerNorm`` over F, which sets eps, dtype and device, and whether weight and bias exist.

    Attributes:
        weight, bias [E, F]: 1 and 0 at the start, or None where `norm` has none.
        local: As in `Experts`.
    """

    local: Callable[[Tensor], Tensor] | None = None

    def __init__(self, num_experts: int, norm: nn.LayerNorm):
        super().__init__()
        self.eps: float = norm.eps
        weight, bias = (
            None if like is None else nn.Parameter(like.new_empty(num_experts, *like.shape))
            for like in (norm.weight, norm.bias)
        )
        self.weight: nn.Parameter | None = weight
        self.bias: nn.Parameter | None = bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets weights to 1 and biases to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalizes hidden values [E, N, F]."""
        weight, bias = _on_this_rank(self, self.weight, self.bias)
        x = F.layer_norm(x, x.shape[-1:], eps=self.eps)
        if weight is not None:
            x = x * weight.unsqueeze(1)
        return x if bias is None else x + bias.unsqueeze(1)


class ExpertList(nn.ModuleList):
    """Experts given as modules of any kind, one module per expert, called one after another.

    Args:
        experts: E modules, each from rows [N, D] to rows [N, D'].
    """

    def __init__(self, experts: Sequence[nn.Module]):
        if not isinstance(experts, Iterable):
            raise TypeError(f"ExpertList: experts must be a sequence of nn.Modules, got {type(experts).__name__}")
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
        """Maps slots x [E, G, C, D] to [E, G, C, D']. Ignores `filled`: an expert reads empty slots as zeros."""
        check = Check("ExpertList")
        check.floating("x", x, "E G C D")
        if x.shape[0] != len(self):
            check.shape("x", x, (len(self), *x.shape[1:]), "E, G, C, D")
        rows = x.flatten(1, 2)
        outputs = [expert(row) for expert, row in zip(self, rows.unbind(), strict=True)]
        width = check.tensor("the output of expert 0", outputs[0], "N D").shape[1]
        for e, y in enumerate(outputs):
            check.shape(f"the output of expert {e}", y, (rows.shape[1], width), "N, D")
        return torch.stack(outputs).unflatten(1, x.shape[1:3])


def mlp_of_slots(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    filled: Tensor | None,
    act: str | Callable[[Tensor], Tensor],
) -> Tensor:
    """Computes the MLPs by the op if it supports the case, else by batched products. x [E, N, D], filled [E, G]."""
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    by_op = isinstance(act, str) and not _transformed() and (device == "cuda" or not autocast)
    if by_op and autocast:
        x, w1, w2 = _autocast(x), _autocast(w1), _autocast(w2)
        b1, b2 = (None if bias is None else _autocast(bias) for bias in (b1, b2))
    if x.dtype != w1.dtype and (by_op or not autocast):
        raise TypeError(f"Experts: x must have the experts' dtype {w1.dtype}, got {x.dtype}")
    if isinstance(act, str):
        if by_op and serves(x):
            return grouped_mlp_unchecked(x, w1, b1, w2, b2, act, filled)
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
    """Computes `ops.grouped_mlp` by two batched products over all rows. Rows that are not filled become zeros.

    `act` may change the width, as a gate does.
    """
    y = _affine(act(_affine(x, w1, b1)), w2, b2)
    if filled is None or filled.shape[1] == 0:
        return y
    place = torch.arange(x.shape[1] // filled.shape[1], device=x.device)
    empty = (place >= filled.unsqueeze(2)).flatten(1)
    return y.masked_fill(empty.unsqueeze(2), 0)


def _on_this_rank(module: Experts | ExpertsNorm, *parameters: Any) -> tuple[Any, ...]:
    """Gives the parts of the parameters that this rank has: all of them, except under expert parallelism."""
    local = module.local
    return parameters if local is None else tuple(None if p is None else local(p) for p in parameters)


def check_drop(check: Check, drop: object) -> float:
    """Checks that `drop` is a dropout rate in [0, 1]."""
    drop = check.number("drop", drop, zero=True)
    if drop > 1:
        raise ValueError(f"{check.where}: drop must be in [0, 1], got {drop}")
    return drop


def _biases(check: Check, bias: object) -> tuple[bool, bool]:
    """Checks that `bias` is a bool for both layers, or a pair with one for each."""
    first, second = bias if isinstance(bias, (tuple, list)) and len(bias) == 2 else (bias, bias)
    return check.flag("bias", first), check.flag("bias", second)


def _transformed() -> bool:
    """Tells whether a transform of `torch.func` or forward-mode AD is active, which the op does not support."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _autocast(x: Tensor) -> Tensor:
    """Casts `x` as CUDA's autocast casts the inputs of a matrix product."""
    eligible = x.dtype in FLOATS and x.dtype != torch.float64
    return cast(x, torch.get_autocast_dtype("cuda")) if eligible else x


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight)
