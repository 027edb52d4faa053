"""The six routers of "Routers in Vision Mixture of Experts: An Empirical Study" (arXiv 2401.15969), by name."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from vmoe_routers.ops._checks import Check
from vmoe_routers.options import did_you_mean
from vmoe_routers.routers.affinity import Sinkhorn, Softmax, SparsityConstrained
from vmoe_routers.routers.soft import SoftRouter
from vmoe_routers.routers.sparse import ExpertChoiceRouter, SparseRouter, TokenChoiceRouter

RouterFactory = Callable[[int, int], nn.Module]
"""Function that makes a router from the width of a token and the number of experts."""


class _Named(NamedTuple):
    router: type[nn.Module]
    affinity: type | None
    defaults: dict[str, Any]


_TABLE: dict[str, _Named] = {
    "softmax_token_choice": _Named(
        TokenChoiceRouter, Softmax, {"importance_loss_weight": 0.005, "load_loss_weight": 0.005}
    ),
    "sinkhorn_token_choice": _Named(TokenChoiceRouter, Sinkhorn, {"noisy_softmax": False}),
    "softmax_expert_choice": _Named(ExpertChoiceRouter, Softmax, {}),
    "sinkhorn_expert_choice": _Named(ExpertChoiceRouter, Sinkhorn, {}),
    "sparsity_constrained_expert_choice": _Named(ExpertChoiceRouter, SparsityConstrained, {"noise_std": 0.0}),
    "soft": _Named(SoftRouter, None, {}),
}

ROUTERS: tuple[str, ...] = tuple(_TABLE)
"""Names of the six routers: softmax_token_choice, sinkhorn_token_choice, softmax_expert_choice, sinkhorn_expert_choice,
sparsity_constrained_expert_choice and soft."""


def router_options(router: str | RouterFactory | None) -> frozenset[str]:
    """Lists the options that `create_router` takes for a router of `ROUTERS`. Gives none for any other router."""
    entry = _TABLE.get(router) if isinstance(router, str) else None
    return frozenset() if entry is None else frozenset(_of_router(entry.router) | _of_affinity(entry.affinity))


def _of_router(router: type[nn.Module]) -> set[str]:
    classes = (router, SparseRouter) if issubclass(router, SparseRouter) else (router,)
    parameters = [p for cls in classes for p in inspect.signature(cls.__init__).parameters.values()]
    return {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _of_affinity(affinity: type | None) -> set[str]:
    return set() if affinity is None else {field.name for field in dataclasses.fields(affinity)}


def create_router(name: str, dim: int, num_experts: int, **options: Any) -> nn.Module:
    """Makes one of the six routers by name. The router is called as ``router(x, mask=None) -> Routing``.

    Args:
        name: One of `ROUTERS`.
        dim: D, width of a token.
        num_experts: E.
        options: Options of the router (`TokenChoiceRouter`, `ExpertChoiceRouter` or `SoftRouter`) and of its affinity
            (`Sinkhorn`, `SparsityConstrained`).

    Raises:
        ValueError: The name is unknown, or a value is out of range.
        TypeError: An option is unknown or has a wrong type.
    """
    Check("create_router").choice("name", name, ROUTERS)
    known = router_options(name)
    for option in options:
        if option not in known:
            others = [other for other in ROUTERS if option in router_options(other)]
            elsewhere = f" ({', '.join(others)} have it)" if others else did_you_mean(option, known)
            raise TypeError(
                f"create_router: {name!r} has no option {option!r}{elsewhere}; it has {', '.join(sorted(known))}"
            )
    router, affinity, defaults = _TABLE[name]
    options = {**defaults, **options}
    if affinity is None:
        return router(dim, num_experts, **options)
    for_affinity = {key: options.pop(key) for key in _of_affinity(affinity) & options.keys()}
    return router(dim, num_experts, affinity(**for_affinity), **options)
