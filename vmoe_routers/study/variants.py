"""Models that a study compares: the dense ViT, and routers with options."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from vmoe_routers.models import vit_moe
from vmoe_routers.options import OptionError
from vmoe_routers.routers import router_options
from vmoe_routers.study.own import is_own, load_factory
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.styles import style
from vmoe_routers.training.data import Images

MOE_BLOCKS = "last_half"


@dataclass(frozen=True)
class Variant:
    """Dense ViT, or a router with the options that the study compares.

    Attributes:
        router: One of `vmoe_routers.ROUTERS`, an own router as ``package.module:factory``, or None: the dense ViT.
        capacity_factor: None for the dense ViT and own routers.
        top_k: K of Token Choice, None for every other router.
        combine: "softmax" or "plan" for Sinkhorn Token Choice, None for every other router.
    """

    router: str | None = None
    capacity_factor: float | None = None
    top_k: int | None = None
    combine: str | None = None

    @property
    def name(self) -> str:
        """Short name, unique in a study, that can be part of a file's name."""
        if self.router is None:
            return "dense"
        parts = [self.router.rpartition(":")[2]]
        parts += [f"k{self.top_k}"] if self.top_k else []
        parts += ["plan"] if self.combine == "plan" else []
        parts += [f"c{self.capacity_factor:g}"] if self.capacity_factor else []
        return "-".join(parts)

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        label = style(self.router).title
        label += f", K={self.top_k}" if self.top_k else ""
        label += ", plan" if self.combine == "plan" else ""
        return label + (f", {self.capacity_factor:g}x" if self.capacity_factor not in (None, 1) else "")

    @property
    def has_phi(self) -> bool:
        """Whether the slots are parameters. Their number depends on the number of tokens."""
        return "num_tokens" in router_options(self.router)

    def describe(self) -> dict[str, Any]:
        """Describes the variant as the record of a run holds it."""
        return {"name": self.name, "label": self.label, **asdict(self)}


def variants(settings: Settings) -> list[Variant]:
    """Lists every variant of a study once, the dense model first.

    Raises:
        OptionError: Two variants have the same name.
    """
    found = [Variant()]
    for factor in settings.capacity_factors:
        for router in settings.routers:
            options = router_options(router)
            capacity_factor = float(factor) if "capacity_factor" in options else None
            top_ks = settings.top_k if "top_k" in options else [None]
            # Expert Choice also has both values of `combine`, but the paper compares them for Token Choice only.
            combines = ["softmax", "plan"] if {"top_k", "combine"} <= options else [None]
            if not settings.plan_combine:
                combines = combines[:1]
            found += [Variant(router, capacity_factor, k, combine) for combine in combines for k in top_ks]
    found = list(dict.fromkeys(found))
    names = Counter(variant.name for variant in found)
    same = [variant for variant in found if names[variant.name] > 1]
    if any(is_own(variant.router) for variant in same):
        raise OptionError(f"routers {settings.routers}: the name {same[0].name!r} must not be used twice", "routers")
    if same:
        raise OptionError(
            f"capacity_factors {settings.capacity_factors} must differ in their first six digits", "capacity_factors"
        )
    return found


def build(variant: Variant, settings: Settings, data: Images, seed: int) -> VisionTransformer:
    """Makes the model of the variant on the device of the settings. All variants of a seed have the same trunk."""
    torch.manual_seed(seed)
    return make(variant, settings, data).to(settings.device)


def make(variant: Variant, settings: Settings, data: Images) -> VisionTransformer:
    """Makes the model of the variant, for images of the size and channels of `data`.

    Raises:
        OptionError: The factory of an own router cannot be imported.
    """
    options: dict[str, Any] = {}
    if variant.router is not None:
        chosen = {"capacity_factor": variant.capacity_factor, "top_k": variant.top_k, "combine": variant.combine}
        options = {name: value for name, value in chosen.items() if value is not None}
        options["num_experts"] = settings.num_experts
        if not variant.has_phi:
            options["group_size"] = settings.group_size
        if "scale_init" in router_options(variant.router):
            options["scale_init"] = settings.scale_init
    return vit_moe(
        img_size=data.size,
        patch_size=settings.patch_size,
        in_chans=data.channels,
        num_classes=data.num_classes,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=settings.mlp_ratio,
        router=load_factory(variant.router) if is_own(variant.router) else variant.router,
        moe_blocks=MOE_BLOCKS,
        # A short training makes little use of position embeddings of the usual standard deviation, 0.02.
        pos_embed_std=1.0,
        **options,
    )
