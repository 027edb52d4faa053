"""MoEMlp, a mixture-of-experts layer that replaces timm's Mlp, and aux_loss, the auxiliary loss of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.experts import ExpertList, Experts, GeluTanh, check_drop
from vmoe_routers.ops._checks import Check, exporting, traced_size, tracing
from vmoe_routers.pending import PendingLosses, total_loss
from vmoe_routers.routers import RouterFactory, Routing, create_router


class MoEMlp(nn.Module):
    """Mixture-of-experts MLP that replaces timm's Mlp: its first arguments are the arguments of Mlp.

    Args:
        in_features, hidden_features, out_features: D, F and D'. F and D' default to D.
        act_layer: Makes the activation of the experts.
        drop: Dropout within the experts.
        num_experts: E.
        router: One of `vmoe_routers.ROUTERS`, a router, or a function ``(dim, num_experts)`` that makes a router. A
            router is a module with the attributes `dim` and `num_experts` and ``forward(x, mask=None) -> Routing``.
        group_size: Images that are routed together. With 1, the result for an image does not depend on other images.
        experts: None makes `Experts` with `hidden_features`, `out_features`, `act_layer`, `drop`, `bias`, `same_init`,
            `glu` and `norm_layer`. These arguments must not be given with other experts. A sequence has E modules from
            rows [N, D] to rows [N, D']. A module has the attribute `num_experts` and ``forward(x, filled) -> y`` from
            slots x [E, G, C, D] to slots [E, G, C, D']. `filled` [G, E] int32 is the number of leading slots
            that may hold a token, or None.
        bias, same_init, glu, norm_layer: Arguments of `Experts`. ``glu=True, act_layer=nn.SiLU`` makes SwiGLU experts.
        router_options: Options of `vmoe_routers.create_router`.

    Attributes:
        router, experts: The modules.
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
        router: str | nn.Module | RouterFactory = "soft",
        group_size: int = 1,
        experts: nn.Module | Sequence[nn.Module] | None = None,
        bias: bool | Sequence[bool] = True,
        same_init: bool = False,
        glu: bool = False,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **router_options: Any,
    ):
        super().__init__()
        check = Check("MoEMlp")
        in_features = check.integer("in_features", in_features, 1)
        sizes = {"hidden_features": hidden_features is not None, "out_features": out_features is not None}
        hidden_features = in_features if hidden_features is None else hidden_features
        out_features = in_features if out_features is None else out_features
        hidden_features = check.integer("hidden_features", hidden_features, 1)
        out_features = check.integer("out_features", out_features, 1)
        num_experts = check.integer("num_experts", num_experts, 1)
        drop = check_drop(check, drop)
        self.in_features = in_features
        self.group_size: int = check.integer("group_size", group_size, 1)
        if isinstance(router, str):
            options = {"device": device, "dtype": dtype, **router_options}
            self.router: nn.Module = create_router(router, in_features, num_experts, **options)
        else:
            self.router = _own_router(router, in_features, num_experts, router_options, device, dtype)
        if experts is None:
            self.experts: nn.Module = Experts(
                num_experts,
                in_features,
                hidden_features,
                out_features,
                act_layer,
                drop,
                bias=bias,
                same_init=same_init,
                glu=glu,
                norm_layer=norm_layer,
                device=device,
                dtype=dtype,
            )
        else:
            unused = {"drop": drop > 0, "bias": bias is not True, "same_init": same_init, "glu": glu}
            unused |= {"norm_layer": norm_layer is not None, "act_layer": act_layer is not GeluTanh, **sizes}
            for name, given in unused.items():
                if given:
                    raise TypeError(f"MoEMlp: {name} must not be given with experts, which it would not change")
            self.experts = _own_experts(experts, num_experts)
        self.pending_losses: PendingLosses = PendingLosses()
        self._end_compiled_losses()
        self.register_load_state_dict_post_hook(_after_loading)

    def reset_parameters(self) -> None:
        """Draws router and experts again, in the order of construction.

        Raises:
            TypeError: A module of router or experts has parameters, but no `reset_parameters`.
        """
        _reset(self.router)
        _reset(self.experts)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Maps tokens x [B, T, D] to [B, T, D']. The mask is [B, T] bool, True = real token.

        The tokens of an image may have several axes: x [B, ..., D] with a mask [B, ...], for example a grid
        [B, H, W, D]. Masked tokens come out as zeros and never affect other tokens, even if they contain NaN or inf.

        Raises:
            ValueError: In training, `group_size` does not divide the batch.
        """
        if isinstance(x, torch.fx.Proxy):
            return self._as_node(x, mask)
        check = Check("MoEMlp")
        if not isinstance(x, Tensor) or x.ndim < 4:
            check.tensor("x", x, "B T D")
        if x.shape[-1] != self.in_features:
            raise ValueError(f"MoEMlp: x must have width in_features={self.in_features}, got {list(x.shape)}")
        if x.ndim > 3:
            if mask is not None:
                check.shape("mask", mask, x.shape[:-1], "B, H, W" if x.ndim == 4 else "B, ..., T")
                mask = mask.flatten(1)
            y = self.forward(x.flatten(1, -2), mask)
            return y.reshape(*x.shape[:-1], y.shape[2])
        if mask is not None:
            check.mask(mask, "x", x, "B T")
        batch, size = x.shape[0], self.group_size
        rest = batch % size if size > 1 else 0
        if rest == 0:
            return self._forward_groups(x, mask, size)
        if self.training:
            raise ValueError(
                f"MoEMlp: a batch of {batch} images is not a multiple of group_size={size}; "
                "drop the last batch, or choose another group_size"
            )
        parts = [(0, batch - rest, size), (batch - rest, batch, rest)]
        outputs = [
            self._forward_groups(x[start:stop], None if mask is None else mask[start:stop], images)
            for start, stop, images in parts
            if start < stop
        ]
        return torch.cat(outputs)

    def _as_node(self, x: torch.fx.Proxy, mask: Any) -> Any:
        """Adds the layer to a graph of torch.fx as one node, because symbolic values cannot be routed."""
        tracer: Any = x.tracer
        if tracer.root is self:
            raise TypeError("MoEMlp: torch.fx cannot trace a layer alone; trace a model that contains the layer")
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x, mask), {})

    def _forward_groups(self, x: Tensor, mask: Tensor | None, images: int) -> Tensor:
        batch, tokens, width = x.shape
        tokens = traced_size(tokens)  # a traced layer has the capacity for this number; another number must fail
        groups = batch // images
        x = x.reshape(groups, images * tokens, width)
        if exporting():
            # With a dynamic batch, torch.export treats the tokens as a symbol after reshape, as a number after expand.
            x = x.expand(groups, images * tokens, width)
        routing = self.router(x, None if mask is None else mask.reshape(groups, images * tokens))
        if not isinstance(routing, Routing):
            raise TypeError(f"MoEMlp: router must return a Routing, got {type(routing).__name__}")
        y = routing.combine(self.experts(routing.dispatch(x), routing.filled))
        Check("MoEMlp").tensor("the output of the routing", y, "G T D")
        if y.shape[:2] != x.shape[:2]:
            Check("MoEMlp").shape("the output of the routing", y, (*x.shape[:2], y.shape[2]), "G, T, D")
        y = y.reshape(batch, tokens, y.shape[-1])
        if self.training and any(routing.loss_weights.values()):
            if tracing():
                raise RuntimeError(
                    "MoEMlp: torch.jit.trace keeps no auxiliary loss: call eval() before tracing, or use torch.compile"
                )
            replica = getattr(self, "_is_replica", False)  # set by nn.DataParallel
            y = self.pending_losses.add(y, lambda: routing.aux_loss, groups, replica)
        return y

    def _end_compiled_losses(self) -> None:
        if any(getattr(self.router, "loss_weights", {}).values()):
            self.pending_losses.end_compiled_by(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores a copy or a pickle, whose parameters have no hooks."""
        super().__setstate__(state)
        self._end_compiled_losses()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._follow_parameters()
        return self

    def _follow_parameters(self) -> None:
        """Connects the losses of compiled forwards with the parameters, which may be new and on another device."""
        parameter = next(self.parameters(), None)
        if parameter is not None:
            self.pending_losses.move(parameter.device)
        self._end_compiled_losses()

    @property
    def fc2(self) -> SimpleNamespace:
        """Second layer under the name of timm's `Mlp`. `init_weights` of timm's models scales its `weight`."""
        return SimpleNamespace(weight=self.experts.w2)

    def no_weight_decay(self) -> set[str]:
        """Names the parameters that optimizers should not decay: biases and norms of the experts."""
        parts = {"router": self.router, "experts": self.experts}
        return {
            f"{part}.{name}" for part, module in parts.items() for name in getattr(module, "no_weight_decay", set)()
        }

    def extra_repr(self) -> str:
        """Lists the arguments that print(layer) shows."""
        return f"group_size={self.group_size}"


def _after_loading(layer: MoEMlp, keys: object) -> None:
    layer._follow_parameters()  # load_state_dict(assign=True) replaces parameters


def _reset(module: nn.Module) -> None:
    """Calls `reset_parameters` of a module, or, if it has none, of its children."""
    reset = getattr(module, "reset_parameters", None)
    if reset is not None:
        reset()
        return
    if next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"MoEMlp: {type(module).__name__} has parameters, but no reset_parameters to draw them again")
    for part in module.children():
        _reset(part)


def _own_router(
    router: nn.Module | RouterFactory,
    dim: int,
    num_experts: int,
    options: dict[str, Any],
    device: Any,
    dtype: torch.dtype | None,
) -> nn.Module:
    """Checks the user's router. If the user gave a factory, first makes the router on the layer's device."""
    if options:
        raise TypeError(
            f"MoEMlp: {', '.join(options)} must be given to the router itself, because router is not a name"
        )
    made = router
    if not isinstance(router, nn.Module):
        wanted = "a function (dim, num_experts) that makes one"
        if not callable(router):
            raise TypeError(f"MoEMlp: router must be a name, a router, or {wanted}, got {type(router).__name__}")
        try:
            signature = inspect.signature(router)
        except ValueError:  # C functions may lack a signature
            signature = None
        if signature is not None:
            try:
                signature.bind(dim, num_experts)
            except TypeError as error:
                name = getattr(router, "__name__", type(router).__name__)
                raise TypeError(f"MoEMlp: router must be {wanted}, got {name}{signature}: {error}") from None
        with nullcontext() if device is None else torch.device(device):
            made = router(dim, num_experts)
        if isinstance(made, nn.Module) and dtype is not None:
            made = made.to(dtype=dtype)
    if not isinstance(made, nn.Module):
        raise TypeError(f"MoEMlp: router must make an nn.Module, got {type(made).__name__}")
    got = getattr(made, "dim", None), getattr(made, "num_experts", None)
    if got != (dim, num_experts):
        raise ValueError(f"MoEMlp: router must have dim {dim} and num_experts {num_experts}, got {got[0]} and {got[1]}")
    return made


def _own_experts(experts: nn.Module | Sequence[nn.Module], num_experts: int) -> nn.Module:
    """Checks the user's experts. Wraps a sequence in `ExpertList`."""
    if isinstance(experts, (nn.ModuleList, list, tuple)):
        experts = experts if isinstance(experts, ExpertList) else ExpertList(list(experts))
    if not isinstance(experts, nn.Module):
        raise TypeError(f"MoEMlp: experts must be a module or a sequence of modules, got {type(experts).__name__}")
    got = getattr(experts, "num_experts", None)
    if got != num_experts:
        raise ValueError(f"MoEMlp: experts must have num_experts {num_experts}, got {got}")
    return experts


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names the parameters of MoE layers that optimizers should not decay, although they have two axes."""
    return {
        f"{path}.{name}" if path else name
        for path, layer in model.named_modules()
        if isinstance(layer, MoEMlp)
        for name in layer.no_weight_decay()
    }


def aux_loss(model: nn.Module) -> Tensor:
    """Sums the auxiliary losses of the MoE layers of `model` over their training forwards.

    Add the result to the training loss: ``(loss + aux_loss(model)).backward()``. A forward in training mode counts
    until a backward pass has used it. Reading the loss has no effect, so the loss can be logged first. The loss works
    with gradient accumulation and scaling, both kinds of activation checkpointing, torch.compile, DataParallel, DDP and
    FSDP2 (docs/auxiliary_losses.md).

    Returns:
        A scalar on the model's device, 0 if no layer has a loss.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"aux_loss: model must be an nn.Module, got {type(model).__name__}")
    return total_loss(model, [layer for layer in model.modules() if isinstance(layer, MoEMlp)])
