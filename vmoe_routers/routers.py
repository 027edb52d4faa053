"""The routers: one front end and three ways to fill the slots, composed with affinities.

The six of "Routers in Vision Mixture of Experts: An Empirical Study"
(arXiv 2401.15969) are one table at the end of this file.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers import ops
from vmoe_routers.affinity import Affinity, Sinkhorn, Softmax, SparsityConstrained
from vmoe_routers.losses import balance_loss, importance_loss, load_loss, z_loss
from vmoe_routers.ops._checks import (
    check_choice,
    check_device,
    check_flag,
    check_floating,
    check_int,
    check_mask,
    check_positive,
    check_tensor,
    compute_dtype,
    fill_absent,
    without_autocast,
)
from vmoe_routers.routing import (
    Routing,
    SoftRouting,
    SparseRouting,
    capacity,
    expert_choice,
    token_choice,
)


def _checked_tokens(
    router: nn.Module, x: Tensor, mask: Tensor | None, dim: int, name: str, parameter: Tensor
) -> Tensor:
    """x with zeros for the tokens that `mask` leaves out: a gradient of 0 times NaN would be NaN."""
    where = type(router).__name__
    x = check_floating(where, "x", check_tensor(where, "x", x, "G T D"))
    if x.shape[2] != dim:
        raise ValueError(f"{where}: x must have width {dim}, got shape {list(x.shape)}")
    check_device(where, "x", x, name, parameter)
    if mask is not None:
        check_mask(where, mask, "x", x)
    return fill_absent(x, mask, 0.0)


class SparseRouter(nn.Module):
    """The front end of the five sparse routers: logits, noise, affinity, losses.

    Routing runs in float32 (float64 for float64 tokens), whatever the dtype of the
    tokens and under autocast.

    Args:
        dim: D, width of a token.
        num_experts: E.
        affinity: what selects and what weighs; see `vmoe_routers.affinity`.
        capacity_factor: slots for every token routed, > 0.
        eval_capacity_factor: the same in eval; None: as in training.
        capacity_rounding, capacity_multiple_of: of `vmoe_routers.capacity`.
        noise_std: in training noise of this over E is added to the logits.
        importance_loss_weight, load_loss_weight, balance_loss_weight, z_loss_weight:
            weights of the auxiliary losses in `Routing.aux_loss`.

    Attributes:
        weight: [E, D], no bias; truncated normal of std sqrt(1 / D).

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        affinity: Affinity | None = None,
        *,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float | None = None,
        capacity_rounding: str = "ceil",
        capacity_multiple_of: int = 4,
        noise_std: float = 1.0,
        importance_loss_weight: float = 0.0,
        load_loss_weight: float = 0.0,
        balance_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        where = type(self).__name__
        self.dim = check_int(where, "dim", dim, 1)
        self.num_experts = check_int(where, "num_experts", num_experts, 1)
        if affinity is not None and (isinstance(affinity, type) or not callable(affinity)):
            raise TypeError(f"{where}: affinity must be an Affinity such as Sinkhorn(), got {affinity!r}")
        self.affinity: Affinity = Softmax() if affinity is None else affinity
        self.capacity_factor = check_positive(where, "capacity_factor", capacity_factor)
        self.eval_capacity_factor = (
            self.capacity_factor
            if eval_capacity_factor is None
            else check_positive(where, "eval_capacity_factor", eval_capacity_factor)
        )
        check_choice(where, "capacity_rounding", capacity_rounding, ("ceil", "round"))
        self.capacity_rounding = capacity_rounding
        self.capacity_multiple_of = check_int(where, "capacity_multiple_of", capacity_multiple_of, 0)
        self.noise_std = check_positive(where, "noise_std", noise_std, zero=True)
        self.loss_weights = {
            name: check_positive(where, f"{name}_loss_weight", weight, zero=True)
            for name, weight in (
                ("importance", importance_loss_weight),
                ("load", load_loss_weight),
                ("balance", balance_loss_weight),
                ("z", z_loss_weight),
            )
        }
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight anew."""
        # Cutting a normal at two standard deviations leaves 0.8796 of them.
        std = math.sqrt(1 / self.dim) / 0.87962566
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def draw_noise(self, logits: Tensor) -> Tensor:
        """Standard normal noise in the shape of the logits."""
        return torch.randn_like(logits)

    def slots(self, tokens: int) -> int:
        """C, the slots per expert for groups of `tokens` tokens."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return capacity(tokens, self.num_experts, factor, self.capacity_rounding, self.capacity_multiple_of)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SparseRouting:
        """Routes tokens x [G, T, D]; mask [G, T] bool, True = real token."""
        x = _checked_tokens(self, x, mask, self.dim, "weight", self.weight)
        with without_autocast(x):
            dtype = compute_dtype(x.dtype)
            logits = nn.functional.linear(x.to(dtype), self.weight.to(dtype))
            noise_std = self.noise_std / self.num_experts if self.training else 0.0
            noisy = logits + noise_std * self.draw_noise(logits) if noise_std > 0 else logits
            return self._route(logits, noisy, noise_std, mask)

    def _route(self, logits: Tensor, noisy: Tensor, noise_std: float, mask: Tensor | None) -> SparseRouting:
        raise NotImplementedError("SparseRouter is a base: use Token or ExpertChoiceRouter")

    def _losses(
        self, logits: Tensor, noisy: Tensor, noise_std: float, top_k: int, mask: Tensor | None
    ) -> dict[str, Any]:
        return {
            "importance": partial(importance_loss, logits, mask),
            "load": partial(load_loss, logits, noisy, noise_std, top_k, mask),
            "balance": partial(balance_loss, noisy, mask),
            "z": partial(z_loss, logits, mask),
        }

    def extra_repr(self) -> str:
        """What print(router) shows."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, affinity={self.affinity}, "
            f"capacity_factor={self.capacity_factor}, noise_std={self.noise_std}"
        )


class TokenChoiceRouter(SparseRouter):
    """Every token chooses `top_k` experts, whose buffers are filled in order (V-MoE, arXiv 2106.05974).

    Choice 1 of every token goes before choice 2 of any; a request that comes to a full buffer is dropped.

    Args:
        top_k: K, experts per token.
        batch_priority: fill the buffers in order of the tokens' largest selecting value.
        renormalize: divide a token's kept gates by the sum of its top_k.
        The others: see `SparseRouter`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        affinity: Affinity | None = None,
        *,
        top_k: int = 1,
        batch_priority: bool = False,
        renormalize: bool = False,
        **options: Any,
    ):
        super().__init__(dim, num_experts, affinity, **options)
        self.top_k = check_int(type(self).__name__, "top_k", top_k, 1, num_experts)
        self.batch_priority = check_flag(type(self).__name__, "batch_priority", batch_priority)
        self.renormalize = check_flag(type(self).__name__, "renormalize", renormalize)

    def slots(self, tokens: int) -> int:
        """See `SparseRouter.slots`; every token asks for K."""
        return super().slots(tokens * self.top_k)

    def _route(self, logits, noisy, noise_std, mask):
        slots = self.slots(logits.shape[1])
        gates, weights = self.affinity(logits, noisy, slots, mask)
        return token_choice(
            gates,
            self.top_k,
            slots,
            batch_priority=self.batch_priority,
            weights=weights,
            renormalize=self.renormalize,
            mask=mask,
            losses=self._losses(logits, noisy, noise_std, self.top_k, mask),
            loss_weights=self.loss_weights,
        )

    def extra_repr(self) -> str:
        """What print(router) shows."""
        return f"{super().extra_repr()}, top_k={self.top_k}, batch_priority={self.batch_priority}"


class ExpertChoiceRouter(SparseRouter):
    """Every expert chooses its C best tokens of the group (Expert Choice, arXiv 2202.09368).

    Capacity is rounded to the nearest (half to even) and not to a multiple by
    default, so that equal factors cost as much as Soft MoE.

    Args:
        renormalize: divide a token's gates by their sum over the experts that took it.
        The others: see `SparseRouter`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        affinity: Affinity | None = None,
        *,
        capacity_rounding: str = "round",
        capacity_multiple_of: int = 1,
        renormalize: bool = False,
        **options: Any,
    ):
        super().__init__(
            dim,
            num_experts,
            affinity,
            capacity_rounding=capacity_rounding,
            capacity_multiple_of=capacity_multiple_of,
            **options,
        )
        self.renormalize = check_flag(type(self).__name__, "renormalize", renormalize)

    def slots(self, tokens: int) -> int:
        """See `SparseRouter.slots`; at most as many as tokens."""
        # An empty group has no token for a slot; expert_choice clamps 1 to it.
        return max(1, min(super().slots(tokens), tokens))

    def _route(self, logits, noisy, noise_std, mask):
        slots = self.slots(logits.shape[1])
        gates, weights = self.affinity(logits, noisy, slots, mask)
        return expert_choice(
            gates,
            slots,
            weights=weights,
            renormalize=self.renormalize,
            mask=mask,
            losses=self._losses(logits, noisy, noise_std, 1, mask),
            loss_weights=self.loss_weights,
        )


class SoftRouter(nn.Module):
    """Soft MoE (arXiv 2308.00951): slots are means of tokens, tokens means of slots.

    ``logits = <x / |x|, scale * Phi / |Phi|>``, Phi normalised over the width; the
    mixing uses the tokens as they are.

    Args:
        dim: D, width of a token.
        num_experts: E.
        slots_per_expert: C, 1 by default.
        capacity_factor: instead of it, together with `num_tokens`, tokens of a group:
            Phi's shape depends on C.
        scale_init: start of the scale. At 1 and small width the slots start as the
            mean token, and short trainings stay there; about 2 sqrt(D) helps those.
        noise_std: in training, standard deviation of noise on the logits.

    Attributes:
        phi: [D, E, C]; truncated normal of std sqrt(1 / D), cut at two of them.
        scale: a scalar.

    Raises:
        TypeError, ValueError: an argument out of range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        slots_per_expert: int | None = None,
        capacity_factor: float | None = None,
        num_tokens: int | None = None,
        scale_init: float = 1.0,
        noise_std: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.dim = check_int("SoftRouter", "dim", dim, 1)
        self.num_experts = check_int("SoftRouter", "num_experts", num_experts, 1)
        if capacity_factor is None:
            if num_tokens is not None:
                raise ValueError("SoftRouter: num_tokens is for capacity_factor, which is not given")
            slots = 1 if slots_per_expert is None else slots_per_expert
            self.slots_per_expert = check_int("SoftRouter", "slots_per_expert", slots, 1)
        elif slots_per_expert is not None:
            raise ValueError("SoftRouter: give slots_per_expert or capacity_factor, not both")
        elif num_tokens is None:
            raise ValueError(
                "SoftRouter: capacity_factor needs num_tokens, the tokens of a group, "
                "because Phi's shape depends on them"
            )
        else:
            num_tokens = check_int("SoftRouter", "num_tokens", num_tokens, 1)
            capacity_factor = check_positive("SoftRouter", "capacity_factor", capacity_factor)
            self.slots_per_expert = capacity(num_tokens, num_experts, capacity_factor, "round", 1)
        self.scale_init = check_positive("SoftRouter", "scale_init", scale_init)
        self.noise_std = check_positive("SoftRouter", "noise_std", noise_std, zero=True)
        shape = (self.dim, self.num_experts, self.slots_per_expert)
        self.phi = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws Phi anew and sets the scale back."""
        std = math.sqrt(1 / self.dim)
        nn.init.trunc_normal_(self.phi, std=std, a=-2 * std, b=2 * std)
        nn.init.constant_(self.scale, self.scale_init)

    def slots(self, tokens: int) -> int:
        """C, the slots per expert: fixed by Phi, whatever the tokens."""
        return self.slots_per_expert

    def draw_noise(self, logits: Tensor) -> Tensor:
        """Standard normal noise in the shape of the logits [G, T, E, C]."""
        return torch.randn_like(logits)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SoftRouting:
        """Routes tokens x [G, T, D]; mask [G, T] bool, True = real token."""
        x = _checked_tokens(self, x, mask, self.dim, "phi", self.phi)
        with without_autocast(x):
            dtype = compute_dtype(x.dtype)
            phi = self.scale.to(dtype) * _unit_columns(self.phi.to(dtype).flatten(1))
            logits = ops.soft_logits(x, phi)
            if self.training and self.noise_std > 0:
                by_slot = logits.unflatten(2, (self.num_experts, self.slots_per_expert))
                logits = logits + self.noise_std * self.draw_noise(by_slot).flatten(2)
            return SoftRouting(logits, self.num_experts, mask)

    def extra_repr(self) -> str:
        """What print(router) shows."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, "
            f"slots_per_expert={self.slots_per_expert}, noise_std={self.noise_std}"
        )


def _unit_columns(x: Tensor) -> Tensor:
    return x * (x.square().sum(0, keepdim=True) + 1e-6).rsqrt()


# name -> router, affinity (None: the router has none), defaults of its own
_TABLE: dict[str, tuple[type[nn.Module], type | None, dict[str, Any]]] = {
    "softmax_token_choice": (
        TokenChoiceRouter,
        Softmax,
        {"importance_loss_weight": 0.005, "load_loss_weight": 0.005},
    ),
    "sinkhorn_token_choice": (TokenChoiceRouter, Sinkhorn, {"noisy_softmax": False}),
    "softmax_expert_choice": (ExpertChoiceRouter, Softmax, {}),
    "sinkhorn_expert_choice": (ExpertChoiceRouter, Sinkhorn, {}),
    "sparsity_constrained_expert_choice": (
        ExpertChoiceRouter,
        SparsityConstrained,
        {"noise_std": 0.0},
    ),
    "soft": (SoftRouter, None, {}),
}

ROUTERS: tuple[str, ...] = tuple(_TABLE)
"""The names of the six routers."""


def _options(router: type[nn.Module], affinity: type | None) -> tuple[set[str], set[str]]:
    """Names of the options of a router and of its affinity."""
    names: set[str] = set()
    for cls in (router, SparseRouter) if issubclass(router, SparseRouter) else (router,):
        for parameter in inspect.signature(cls.__init__).parameters.values():
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                names.add(parameter.name)
    of_affinity = set() if affinity is None else {f.name for f in dataclasses.fields(affinity)}
    return names, of_affinity


def create_router(name: str, dim: int, num_experts: int, **options: Any) -> nn.Module:
    """One of the six routers by name, called as ``router(x, mask=None) -> Routing``.

    Args:
        name: one of `ROUTERS`.
        dim: D, width of a token.
        num_experts: E.
        options: of `TokenChoiceRouter`, `ExpertChoiceRouter` or `SoftRouter`, and of
            the affinity (`Sinkhorn`, `SparsityConstrained`).

    Raises:
        ValueError: an unknown name or a value out of range.
        TypeError: an unknown option or a wrong type.
    """
    check_choice("create_router", "name", name, ROUTERS)
    router, affinity, defaults = _TABLE[name]
    of_router, of_affinity = _options(router, affinity)
    for option in options:
        if option not in of_router | of_affinity:
            known = ", ".join(sorted(of_router | of_affinity))
            raise TypeError(f"create_router: {name!r} has no option {option!r}; it has {known}")
    options = {**defaults, **options}
    for_affinity = {key: options.pop(key) for key in of_affinity & options.keys()}
    if affinity is None:
        return router(dim, num_experts, **options)
    return router(dim, num_experts, affinity(**for_affinity), **options)


__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "Routing",
    "SoftRouter",
    "SparseRouter",
    "TokenChoiceRouter",
    "create_router",
]
