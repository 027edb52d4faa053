"""Ops: one public function each, registered with torch's dispatcher.

``torch.ops.vmoe_routers.<op>`` runs the kernel. The public function documents the arguments and checks them first.
`vmoe_routers.ops.reference` defines every op in plain PyTorch.
"""

try:
    from vmoe_routers import _C  # noqa: F401  (registers the CPU kernels)
except ImportError as _error:
    raise ImportError(
        "vmoe_routers: this folder has no compiled kernels; install the package (pip install .) "
        f"and import it from outside the source folder ({_error})"
    ) from _error

from vmoe_routers.ops._cuda import WITHOUT_CUDA  # noqa: F401  (loads the CUDA kernels)
from vmoe_routers.ops.assign_slots import assign_slots
from vmoe_routers.ops.combine import combine
from vmoe_routers.ops.dispatch import dispatch
from vmoe_routers.ops.grouped_mlp import grouped_mlp
from vmoe_routers.ops.invert_slots import invert_slots
from vmoe_routers.ops.ksparse_projection import ksparse_projection
from vmoe_routers.ops.ksparse_transport import ksparse_transport
from vmoe_routers.ops.sinkhorn import sinkhorn
from vmoe_routers.ops.soft_logits import soft_logits
from vmoe_routers.ops.soft_mix import soft_mix
from vmoe_routers.ops.softmax_gather import softmax_gather
from vmoe_routers.ops.softmax_topk import softmax_topk
from vmoe_routers.ops.topk import topk

__all__ = [
    "assign_slots",
    "combine",
    "dispatch",
    "grouped_mlp",
    "invert_slots",
    "ksparse_projection",
    "ksparse_transport",
    "sinkhorn",
    "soft_logits",
    "soft_mix",
    "softmax_gather",
    "softmax_topk",
    "topk",
]
