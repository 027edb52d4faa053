"""Model names for timm: ``timm.create_model("soft_moe_base_patch16_224", num_experts=32)``.

Importing `vmoe_routers.models` registers ``<router>_moe_<size>_patch<p>_224`` for the six routers and every size and
patch of `PATCHES`. Keywords are arguments of `vit_moe` and override the arguments that the name implies. The names have
no pretrained weights. Load weights by `vmoe_routers.checkpoints`, or make them by `upcycle`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.data.constants import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.models import DefaultCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import checkpoint_filter_fn

from vmoe_routers.models.transformer import MoEVisionTransformer
from vmoe_routers.models.vit import SIZES, vit_moe
from vmoe_routers.routers import ROUTERS, router_options

PATCHES: dict[str, tuple[int, ...]] = {
    "tiny": (16,),
    "small": (32, 16, 14),
    "base": (32, 16, 14),
    "large": (32, 16, 14),
    "huge": (14,),
}
"""Patch sizes in pixels, for each model size."""

_LETTERS = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H"}

_MODELS = {
    f"{router}_moe_{size}_patch{patch}_224": (router, size, patch)
    for router in ROUTERS
    for size, patches in PATCHES.items()
    for patch in patches
}
NAMES: tuple[str, ...] = tuple(_MODELS)
"""Registered names, ``<router>_moe_<size>_patch<p>_224``, such as soft_moe_small_patch16_224."""

default_cfgs: dict[str, DefaultCfg] = generate_default_cfgs(
    {
        name: {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_INCEPTION_MEAN,  # pixels in [-1, 1], as in the reference models
            "std": IMAGENET_INCEPTION_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
        for name in NAMES
    }
)


def _entrypoint(name: str, router: str, size: str, patch: int) -> Callable[..., MoEVisionTransformer]:
    def create(pretrained: bool = False, **kwargs: Any) -> MoEVisionTransformer:
        arguments: dict[str, Any] = {"patch_size": patch, **SIZES[_LETTERS[size]], "router": router, **kwargs}
        # As many slots as tokens, like the sparse routers, whose capacity factor is 1 by default.
        if "slots_per_expert" in router_options(arguments["router"]) and "slots_per_expert" not in kwargs:
            arguments.setdefault("capacity_factor", 1.0)
        feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
        return build_model_with_cfg(
            vit_moe,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,  # resamples the positions
            feature_cfg=feature_cfg,
            **arguments,
        )

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"ViT-{_LETTERS[size]}/{patch} with MoE layers in the last half, router {router!r}."
    return create


for _name, _parts in _MODELS.items():
    register_model(_entrypoint(_name, *_parts))
