"""Routers for vision mixtures of experts.

One formulation with two routing tensors, dispatch and combine, and the six routers of
"Routers in Vision Mixture of Experts: An Empirical Study" (arXiv 2401.15969), with
C++/CUDA kernels behind autograd-aware PyTorch ops.
"""

import vmoe_routers._ctrl_c  # noqa: F401  (before torch, which takes seconds to import)

# isort: split
from importlib.metadata import version

from vmoe_routers import affinity, checkpoints, losses, ops
from vmoe_routers.moe import Experts, MoEMlp, aux_loss
from vmoe_routers.ops import ksparse_projection, ksparse_transport, sinkhorn
from vmoe_routers.routers import (
    ROUTERS,
    ExpertChoiceRouter,
    SoftRouter,
    TokenChoiceRouter,
    create_router,
)
from vmoe_routers.routing import (
    Routing,
    SoftRouting,
    SparseRouting,
    capacity,
    expert_choice,
    token_choice,
)

__version__ = version("vmoe_routers")

__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
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
    "ksparse_projection",
    "ksparse_transport",
    "losses",
    "ops",
    "sinkhorn",
    "token_choice",
]
