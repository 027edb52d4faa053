"""Models, batches and comparisons of the tests on several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import vmoe_routers as vr
from vmoe_routers.models import vit_moe

WEIGHTS = {f"{name}_loss_weight": 1.0 for name in ("importance", "load", "balance", "z")}
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax_token_choice": {"top_k": 2, "noise_std": 0.5, **WEIGHTS},
    "softmax_expert_choice": {"noise_std": 0.5, **WEIGHTS},
    "sinkhorn_token_choice": {"noise_std": 0.0},
    "sinkhorn_expert_choice": {"noise_std": 0.0},
    "sparsity_constrained_expert_choice": {},
    "soft": {"slots_per_expert": 3, "scale_init": 8.0},
}
assert set(ROUTERS) == set(vr.ROUTERS)
PER_RANK = 4


def same_noise(model: nn.Module) -> nn.Module:
    """Replaces the routers' noise by a function of the logits, which is the same in one process and in many."""
    for module in model.modules():
        if hasattr(module, "draw_noise"):
            module.draw_noise = _noise
    return model


def _noise(logits: Tensor) -> Tensor:
    return (logits.detach() * 100).sin()


def vit(router: str, seed: int = 0, **options: Any) -> Any:
    """Makes a ViT of two blocks, one with experts, in training mode and in float64."""
    torch.manual_seed(seed)
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_experts": 4, "group_size": 2}
    model = vit_moe(8, 4, 3, 10, router=router, **{**sizes, **ROUTERS[router], **options}).double().train()
    # A head of zeros would give the blocks no gradient.
    nn.init.normal_(model.head.weight, std=0.5)
    return same_noise(model)


def batch(images: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, 8, 8, generator=generator).double(), torch.randint(10, (images,), generator=generator)


def mine(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Gives this rank's equal part of the tensors."""
    return tuple(tensor.chunk(dist.get_world_size())[dist.get_rank()] for tensor in tensors)


def loss_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels) + vr.aux_loss(model)


def whole(tensor: Any) -> Tensor:
    """Gives a copy of a tensor, unsharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def apart(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Gives the largest difference of two sets of tensors, relative to the largest value of each tensor."""
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    scale = max(float(tensor.abs().max()) for tensor in wanted.values())
    return max(
        float((found[n] - wanted[n]).abs().max() / max(float(wanted[n].abs().max()), 1e-3 * scale)) for n in wanted
    )
