"""The layer: experts, and MoEMlp, a drop-in for timm's Mlp."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.ops import grouped_mlp
from vmoe_routers.ops._checks import (
    check_flag,
    check_floating,
    check_int,
    check_mask,
    check_positive,
    check_shape,
    check_tensor,
)
from vmoe_routers.routers import SoftRouter, SparseRouter, create_router
from vmoe_routers.routing import Routing

GeluTanh = partial(nn.GELU, approximate="tanh")
"""GELU in its tanh form, as the reference's models have it."""


class Experts(nn.Module):
    """E two-layer MLPs, ``act(x w1 + b1) w2 + b2``, computed at once by `ops.grouped_mlp`.

    An ``nn.GELU`` without dropout is part of that op, and its module is not called.

    Args:
        num_experts: E.
        in_features, hidden_features, out_features: D, F and D'.
        act_layer: makes the activation.
        drop: dropout behind the activation and behind the second layer.
        bias: whether there are b1 and b2.
        same_init: all experts from one draw, as in the reference's code; by default
            each from its own.

    Raises:
        TypeError, ValueError: an argument out of range.

    Attributes:
        w1 [E, D, F], b1 [E, F], w2 [E, F, D'], b2 [E, D']: Xavier uniform, biases 0.
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
        num_experts = check_int("Experts", "num_experts", num_experts, 1)
        in_features = check_int("Experts", "in_features", in_features, 1)
        hidden_features = check_int("Experts", "hidden_features", hidden_features, 1)
        out_features = check_int("Experts", "out_features", out_features, 1)
        if not callable(act_layer):
            raise TypeError(f"Experts: act_layer must make an activation, as nn.GELU does, got {act_layer!r}")
        bias = check_flag("Experts", "bias", bias)
        make = partial(torch.empty, device=device, dtype=dtype)
        self.same_init = check_flag("Experts", "same_init", same_init)
        self.w1 = nn.Parameter(make(num_experts, in_features, hidden_features))
        self.b1 = nn.Parameter(make(num_experts, hidden_features)) if bias else None
        self.w2 = nn.Parameter(make(num_experts, hidden_features, out_features))
        self.b2 = nn.Parameter(make(num_experts, out_features)) if bias else None
        self.act = act_layer()
        self.drop = nn.Dropout(_check_drop("Experts", drop))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights anew."""
        for weight in (self.w1, self.w2):
            for expert in weight:
                nn.init.xavier_uniform_(expert)
            if self.same_init:
                with torch.no_grad():
                    weight[1:] = weight[0]
        for bias in (self.b1, self.b2):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: Tensor, filled: Tensor | None = None) -> Tensor:
        """Slots x [G, E, C, D] to [G, E, C, D'].

        Of a buffer only the first `filled` [G, E] int32 slots are computed, the others are zeros; None: all.
        """
        check_floating("Experts", "x", check_tensor("Experts", "x", x, "G E C D"), tangent=True)
        groups, experts, slots, _ = x.shape
        wanted = (groups, self.w1.shape[0], slots, self.w1.shape[1])
        check_shape("Experts", "x", x, wanted, "G, E, C, D")
        if filled is not None:
            check_shape("Experts", "filled", filled, (groups, experts), "G, E")
        rows = x.transpose(0, 1).reshape(experts, groups * slots, x.shape[3])
        filled = None if filled is None else filled.t()
        y = grouped_mlp(rows, self.w1, self.b1, self.w2, self.b2, self._activation(), filled)
        return self.drop(y).unflatten(1, (groups, slots)).transpose(0, 1)

    def _activation(self) -> str | Callable[[Tensor], Tensor]:
        drops = self.training and self.drop.p > 0
        if type(self.act) is nn.GELU and not drops:
            return "gelu_tanh" if self.act.approximate == "tanh" else "gelu"
        return self._act_and_drop

    def _act_and_drop(self, hidden: Tensor) -> Tensor:
        return self.drop(self.act(hidden))

    def extra_repr(self) -> str:
        """What print(experts) shows."""
        experts, width, hidden = self.w1.shape
        return f"{experts} x ({width} -> {hidden} -> {self.w2.shape[2]})"


class MoEMlp(nn.Module):
    """A mixture-of-experts MLP: takes timm's Mlp arguments first and stands in its place.

    Args:
        in_features, hidden_features, out_features: D, F and D'; None: D.
        act_layer: makes the activation of an expert.
        drop: dropout within the experts.
        num_experts: E.
        router: one of `vmoe_routers.ROUTERS`, or a router that was made already.
        group_size: images that are routed together. With 1 an image's result does
            not depend on the others in its batch.
        bias, same_init: of `Experts`.
        norm_layer: for timm's sake; only None.
        router_options: of `vmoe_routers.create_router`.

    Attributes:
        router, experts: the modules.
        routings: the routings of the last forward; one, or two where in eval the
            last group was smaller.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = GeluTanh,
        drop: float = 0.0,
        *,
        num_experts: int = 32,
        router: str | nn.Module = "soft",
        group_size: int = 1,
        bias: bool = True,
        same_init: bool = False,
        norm_layer: None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **router_options: Any,
    ):
        super().__init__()
        if norm_layer is not None:
            raise ValueError("MoEMlp: norm_layer must be None, experts have no norm inside")
        in_features = check_int("MoEMlp", "in_features", in_features, 1)
        hidden_features = in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        hidden_features = check_int("MoEMlp", "hidden_features", hidden_features, 1)
        out_features = check_int("MoEMlp", "out_features", out_features, 1)
        num_experts = check_int("MoEMlp", "num_experts", num_experts, 1)
        drop = _check_drop("MoEMlp", drop)
        self.in_features = in_features
        self.group_size = check_int("MoEMlp", "group_size", group_size, 1)
        if isinstance(router, nn.Module):
            self.router = _check_router(router, in_features, num_experts, router_options)
        else:
            self.router = create_router(router, in_features, num_experts, device=device, dtype=dtype, **router_options)
        self.experts = Experts(
            num_experts,
            in_features,
            hidden_features,
            out_features,
            act_layer,
            drop,
            bias=bias,
            same_init=same_init,
            device=device,
            dtype=dtype,
        )
        self.routings: tuple[Routing, ...] = ()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Tokens x [B, T, D] to [B, T, D']; mask [B, T] bool, True = real token.

        The others get zeros, and whatever is in them changes nothing, infinity and NaN neither.

        Raises:
            ValueError: in training, a batch that `group_size` does not divide.
        """
        check_floating("MoEMlp", "x", check_tensor("MoEMlp", "x", x, "B T D"))
        if x.shape[2] != self.in_features:
            raise ValueError(f"MoEMlp: x must have width in_features={self.in_features}, got {list(x.shape)}")
        if mask is not None:
            check_mask("MoEMlp", mask, "x", x, "B T")
        batch, size = x.shape[0], self.group_size
        if self.training and batch % size:
            raise ValueError(
                f"MoEMlp: a batch of {batch} images is not a multiple of group_size={size}; "
                "drop the last batch, or choose another group_size"
            )
        whole = batch - batch % size
        parts = [(0, whole, size)] if whole or not batch else []
        if batch > whole:
            parts.append((whole, batch, batch - whole))
        routings, outputs = [], []
        for start, stop, images in parts:
            part = None if mask is None else mask[start:stop]
            routing, y = self._forward_groups(x[start:stop], part, images)
            routings.append(routing)
            outputs.append(y)
        # Under export a module may not be changed, and nobody could read it.
        if not torch.compiler.is_exporting():
            self.routings = tuple(routings)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _forward_groups(self, x: Tensor, mask: Tensor | None, images: int) -> tuple[Routing, Tensor]:
        batch, tokens, width = x.shape
        groups = batch // images
        x = x.reshape(groups, images * tokens, width)
        routing = self.router(x, None if mask is None else mask.reshape(groups, images * tokens))
        y = routing.combine(self.experts(routing.dispatch(x), routing.filled))
        return routing, y.reshape(batch, tokens, y.shape[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the last routings behind: they hold a graph."""
        return {**self.__dict__, "routings": ()}

    def extra_repr(self) -> str:
        """What print(layer) shows."""
        return f"group_size={self.group_size}"


def _check_drop(where: str, drop: object) -> float:
    drop = check_positive(where, "drop", drop, zero=True)
    if drop > 1:
        raise ValueError(f"{where}: drop must be in [0, 1], got {drop}")
    return drop


def _check_router(router: nn.Module, dim: int, num_experts: int, options: dict[str, Any]) -> nn.Module:
    if not isinstance(router, (SparseRouter, SoftRouter)):
        raise TypeError(f"MoEMlp: router must be a name or a router of vmoe_routers, got {type(router).__name__}")
    if options:
        raise TypeError(f"MoEMlp: {', '.join(options)} must be given to the router, which was made already")
    if (router.dim, router.num_experts) != (dim, num_experts):
        raise ValueError(
            f"MoEMlp: router must have width {dim} and {num_experts} experts, got {router.dim} and {router.num_experts}"
        )
    return router


def aux_loss(model: nn.Module) -> Tensor:
    """The sum over the MoE layers of `model` of their last forward's auxiliary loss.

    A scalar; add it to the training loss. 0 where no layer has one. Its gradient goes through the last forward's
    graph, so a layer under activation checkpointing must be checkpointed with `use_reentrant=False`.

    Raises:
        TypeError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"aux_loss: model must be an nn.Module, got {type(model).__name__}")
    total: Tensor | None = None
    for layer in model.modules():
        if not isinstance(layer, MoEMlp):
            continue
        groups = sum(routing.num_groups for routing in layer.routings)
        for routing in layer.routings:
            loss = routing.aux_loss * (routing.num_groups / max(groups, 1))
            total = loss if total is None else total + loss
    return torch.zeros(()) if total is None else total
