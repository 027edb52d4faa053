"""Routers: map tokens to a `Routing`, which dispatches tokens to slots and combines the experts' outputs.

A sparse router computes logits, its affinity turns the logits into gates, a choice fills the slots, and a routing holds
the result: `sparse` -> `affinity` -> `gates` -> `choice` -> `routing`. Soft MoE mixes tokens instead (`soft`).
"""

from vmoe_routers.routers import affinity, losses
from vmoe_routers.routers.choice import capacity, expert_choice, token_choice
from vmoe_routers.routers.named import ROUTERS, RouterFactory, create_router, router_options
from vmoe_routers.routers.routing import Routing, SoftRouting, SparseRouting
from vmoe_routers.routers.soft import SoftRouter
from vmoe_routers.routers.sparse import ExpertChoiceRouter, SparseRouter, TokenChoiceRouter

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "RouterFactory",
    "Routing",
    "SoftRouter",
    "SoftRouting",
    "SparseRouter",
    "SparseRouting",
    "TokenChoiceRouter",
    "affinity",
    "capacity",
    "create_router",
    "expert_choice",
    "losses",
    "router_options",
    "token_choice",
]
