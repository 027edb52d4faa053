"""Models that a study compares: the dense ViT, and routers with options."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vmoe_routers.models import vit_moe
from vmoe_routers.moe import MoEMlp
from vmoe_routers.options import OptionError
from vmoe_routers.routers import router_options
from vmoe_routers.study.ablations import ABLATIONS, Arm
from vmoe_routers.study.images import StudyData
from vmoe_routers.study.own import is_own, load_factory
from vmoe_routers.study.settings import Settings
from vmoe_routers.study.styles import style


@dataclass(frozen=True)
class Variant:
    """Dense ViT, or a router with the options that the study compares.

    Attributes:
        router: One of `vmoe_routers.ROUTERS`, an own router as ``package.module:factory``, or None: the dense ViT.
        capacity_factor: None for the dense ViT and own routers.
        top_k: K of Token Choice, None for every other router.
        combine: "softmax" or "plan" for Sinkhorn Token Choice, None for every other router.
        batch_priority: Whether Token Choice fills its buffers by priority, None for every other router.
        ablation: The ablation's name; None: the variant belongs to the comparison.
        arm: The label of the ablation's value.
    """

    router: str | None = None
    capacity_factor: float | None = None
    top_k: int | None = None
    combine: str | None = None
    batch_priority: bool | None = None
    ablation: str | None = None
    arm: str | None = None

    @property
    def name(self) -> str:
        """Short name, unique in a study, that can be part of a file's name."""
        parts = ["dense" if self.router is None else self.router.rpartition(":")[2]]
        parts += [f"k{self.top_k}"] if self.top_k else []
        parts += ["plan"] if self.combine == "plan" else []
        parts += ["priority"] if self.batch_priority else []
        parts += [f"c{self.capacity_factor:g}"] if self.capacity_factor else []
        parts += [self.ablation, (self.arm or "").replace(" ", "_")] if self.ablation else []
        return "-".join(parts)

    @property
    def label(self) -> str:
        """Name in tables and figures."""
        label = style(self.router).title
        label += f", K={self.top_k}" if self.top_k else ""
        label += ", plan" if self.combine == "plan" else ""
        label += ", priority" if self.batch_priority else ""
        label += f", {self.capacity_factor:g}x" if self.capacity_factor not in (None, 1) else ""
        return label + (f" ({ABLATIONS[self.ablation].title}: {self.arm})" if self.ablation else "")

    @property
    def has_phi(self) -> bool:
        """Whether the slots are parameters. The number of slots depends on the number of tokens."""
        return "num_tokens" in router_options(self.router)

    def describe(self) -> dict[str, Any]:
        """Describes the variant as the record of a run holds it."""
        return {"name": self.name, "label": self.label, **asdict(self)}

    def _arm(self) -> Arm:
        if self.ablation is None:
            return Arm("")
        return next(arm for arm in ABLATIONS[self.ablation].arms if arm.label == self.arm)

    def changes(self) -> dict[str, Any]:
        """Returns the router's options that the ablation changes."""
        return {**self._arm().options}

    def settings(self, settings: Settings) -> Settings:
        """Returns the settings of the variant's runs, with its learning rate and the changes of its ablation."""
        arm, rates = self._arm(), settings.learning_rates
        rate = rates.get(self.router or "dense", settings.learning_rate) * arm.factor
        return replace(settings, learning_rate=rate, learning_rates={}, **arm.settings)

    def options(self, settings: Settings) -> dict[str, Any]:
        """Returns the options of `vit_moe` that belong to the router."""
        if self.router is None:
            return {}
        chosen = ("capacity_factor", "top_k", "combine", "batch_priority")
        options = {name: value for name in chosen if (value := getattr(self, name)) is not None}
        options["num_experts"] = settings.num_experts
        if not self.has_phi:
            options["group_size"] = settings.group_size
        if "capacity_rounding" in router_options(self.router):
            # By default, Token Choice rounds up to a multiple of 4 and Expert Choice to the nearest number, as their
            # reference codes do. In a study, equal capacity factors mean equal numbers of slots.
            options |= {"capacity_rounding": "round", "capacity_multiple_of": 1}
        if "scale_init" in router_options(self.router):
            options["scale_init"] = settings.scale_init
        return options | self.changes()


def variants(settings: Settings) -> list[Variant]:
    """Lists every variant of the comparison once, the dense model first.

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
            priorities: list[bool | None] = [False] if "batch_priority" in options else [None]
            if settings.batch_priority and "batch_priority" in options and combines == [None]:
                priorities.append(True)
            found += [
                Variant(router, capacity_factor, k, combine, priority)
                for priority in priorities
                for combine in combines
                for k in top_ks
            ]
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


def ablated(settings: Settings) -> list[Variant]:
    """Lists the variants of the ablations, without the arms that change nothing."""
    found = []
    for name in settings.ablations:
        for router in ABLATIONS[name].routers:
            if router != "dense" and router not in settings.routers:
                continue
            for arm in ABLATIONS[name].arms:
                base = base_variant(router)
                variant = replace(base, ablation=name, arm=arm.label)
                if variant.settings(settings) != base.settings(settings) or arm.options:
                    found.append(variant)
    return list(dict.fromkeys(found))


def planned_runs(settings: Settings) -> list[tuple[Variant, int]]:
    """Lists the runs of a study: variants and seeds.

    Seed by seed, so that an interrupted study has runs of every variant to compare. Ablations come last.
    """
    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    of_comparison, of_ablations = variants(settings), ablated(settings)
    runs = [(variant, seed) for seed in seeds for variant in of_comparison]
    return runs + [(variant, seed) for seed in seeds[: settings.ablation_seeds] for variant in of_ablations]


def base_variant(router: str) -> Variant:
    """Returns the variant of the comparison that an ablation changes: capacity factor 1, and K = 1."""
    if router == "dense":
        return Variant()
    options = router_options(router)
    return Variant(
        router,
        1.0,
        1 if "top_k" in options else None,
        "softmax" if {"top_k", "combine"} <= options else None,
        False if "batch_priority" in options else None,
    )


def build(variant: Variant, settings: Settings, data: StudyData, seed: int) -> VisionTransformer:
    """Makes the model of the variant on the device of the settings. All variants of a seed have the same trunk."""
    torch.manual_seed(seed)
    return make(variant, settings, data).to(settings.device)


def make(variant: Variant, settings: Settings, data: StudyData) -> VisionTransformer:
    """Makes the model of the variant, for images of the size and channels of `data`.

    Raises:
        OptionError: The factory of an own router cannot be imported.
    """
    model = vit_moe(
        img_size=data.size,
        patch_size=settings.patch_size,
        in_chans=data.channels,
        num_classes=data.num_classes,
        embed_dim=settings.width,
        depth=settings.depth,
        num_heads=settings.heads,
        mlp_ratio=settings.mlp_ratio,
        router=load_factory(variant.router) if is_own(variant.router) else variant.router,
        moe_blocks=settings.moe_blocks,
        # A short training makes little use of position embeddings of the usual standard deviation, 0.02.
        pos_embed_std=1.0,
        **variant.options(settings),
    )
    if "head_bias" in settings.training:
        nn.init.constant_(cast(nn.Linear, model.head).bias, settings.training["head_bias"])
    if settings.identical_experts:
        for layer in (module for module in model.modules() if isinstance(module, MoEMlp)):
            for parameter in layer.experts.parameters():  # [E, ...]
                parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    return model
