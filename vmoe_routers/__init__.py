"""Routers for vision mixtures of experts.

The six routers of "Routers in Vision Mixture of Experts: An Empirical Study" (arXiv 2401.15969) in one formulation with
two routing tensors, dispatch and combine. C++ and CUDA kernels run as PyTorch ops with gradients.
"""

import vmoe_routers._ctrl_c  # noqa: F401  (before torch, whose import takes seconds)

# isort: split
from importlib.metadata import version

from vmoe_routers import checkpoints, inspect, ops
from vmoe_routers.experts import ExpertList, Experts
from vmoe_routers.moe import MoEMlp, aux_loss
from vmoe_routers.ops import ksparse_projection, ksparse_transport, sinkhorn
from vmoe_routers.routers import (
    ROUTERS,
    ExpertChoiceRouter,
    Routing,
    SoftRouter,
    SoftRouting,
    SparseRouting,
    TokenChoiceRouter,
    affinity,
    capacity,
    create_router,
    expert_choice,
    losses,
    token_choice,
)

__version__ = version("vmoe_routers")

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "ExpertList",
    "Experts",
    "MoEMlp",
    "Routing",
    "SoftRouter",
    "SoftRouting",
    "SparseRouting",
    "TokenChoiceRouter",
    "affinity",
    "aux_loss",
    "capacity",
    "checkpoints",
    "create_router",
    "expert_choice",
    "inspect",
    "ksparse_projection",
    "ksparse_transport",
    "losses",
    "ops",
    "sinkhorn",
    "token_choice",
]
