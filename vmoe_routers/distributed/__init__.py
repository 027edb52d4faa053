"""Training on many devices by the engines of torch.distributed: DDP, FSDP2, expert parallelism (docs/distributed.md).

`parallelize` shards a model over all ranks. `clip_grad_norm_`, `Ema`, `whole_state_dict` and `padded_batches` work in
one process, too, and under every layout.
"""

from vmoe_routers.distributed.clip import clip_grad_norm_
from vmoe_routers.distributed.ema import Ema
from vmoe_routers.distributed.evaluation import padded_batches
from vmoe_routers.distributed.expert_parallel import ExpertParallel
from vmoe_routers.distributed.meshes import Meshes
from vmoe_routers.distributed.parallelize import parallelize
from vmoe_routers.distributed.state import whole_state_dict

__all__ = [
    "Ema",
    "ExpertParallel",
    "Meshes",
    "clip_grad_norm_",
    "padded_batches",
    "parallelize",
    "whole_state_dict",
]
