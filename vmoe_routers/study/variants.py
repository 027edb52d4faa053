"""The models that a study compares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from vmoe_routers.models import vit_moe
from vmoe_routers.options import OptionError
from vmoe_routers.study.settings import Settings
from vmoe_routers.training.data import Images

MOE_BLOCKS = "last_half"


@dataclass(frozen=True)
class Variant:
    """A dense ViT, or a router at a capacity.

    Attributes:
        router: one of `vmoe_routers.ROUTERS`; None: dense.
        capacity_factor: None for dense.
        top_k: for Token Choice.
        combine: "softmax" or "plan", for Sinkhorn Token Choice.
    """

    router: str | None = None
    capacity_factor: float | None = None
    top_k: int | None = None
    combine: str | None = None

    @property
    def name(self) -> str:
        """Short, unique and fit for a file's name."""
        if self.router is None:
            return "dense"
        parts = [self.router, f"k{self.top_k}" if self.top_k else "", "plan" if self.combine == "plan" else ""]
        return "-".join([part for part in parts if part] + [f"c{self.capacity_factor:g}"])

    @property
    def label(self) -> str:
        """For tables and figures."""
        if self.router is None:
            return "Dense ViT"
        label = self.router.replace("_", " ").title().replace("Sparsity Constrained", "Sparsity-constrained")
        label = "Soft MoE" if self.router == "soft" else label
        label += f", K={self.top_k}" if self.top_k else ""
        label += ", plan" if self.combine == "plan" else ""
        return label + (f", {self.capacity_factor:g}x" if self.capacity_factor != 1 else "")

    def describe(self) -> dict[str, Any]:
        """As it stands in a run's record."""
        return {"name": self.name, "label": self.label, **asdict(self)}


def variants(settings: Settings) -> list[Variant]:
    """Every variant of a study once, the dense model first.

    Raises:
        OptionError: two capacity factors have one name.
    """
    found = [Variant()]
    for factor in settings.capacity_factors:
        for router in settings.routers:
            combines = ["softmax", "plan"] if router == "sinkhorn_token_choice" else [None]
            if not settings.plan_combine:
                combines = combines[:1]
            for combine in combines:
                for k in settings.top_k if router.endswith("token_choice") else [None]:
                    found.append(Variant(router, float(factor), k, combine))
    found = list(dict.fromkeys(found))
    if len({variant.name for variant in found}) < len(found):
        raise OptionError(
            f"capacity_factors {settings.capacity_factors} must differ in their first six digits", "capacity_factors"
        )
    return found


def build(variant: Variant, settings: Settings, data: Images, seed: int) -> VisionTransformer:
    """The variant's model on the settings' device. One seed gives every variant the same trunk."""
    torch.manual_seed(seed)
    return make(variant, settings, data).to(settings.device)


def make(variant: Variant, settings: Settings, data: Images) -> VisionTransformer:
    """The variant's model, for images like the data's."""
    options: dict[str, Any] = {}
    if variant.router is not None:
        options = {"num_experts": settings.num_experts, "capacity_factor": variant.capacity_factor}
        if variant.router == "soft":
            options["scale_init"] = settings.scale_init
        else:
            options["group_size"] = settings.group_size
        if variant.top_k is not None:
            options["top_k"] = variant.top_k
        if variant.combine is not None:
            options["combine"] = variant.combine
    return vit_moe(
        img_size=data.size,
        patch_size=settings.patch_size,
        in_chans=data.channels,
        num_classes=data.num_classes,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=settings.mlp_ratio,
        router=variant.router,
        moe_blocks=MOE_BLOCKS,
        # A learned table of the usual std 0.02 starves short trainings.
        pos_embed_std=1.0,
        **options,
    )
