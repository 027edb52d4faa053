"""Recipes of a study: named settings. Options override them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.settings import Settings
from vmoe_routers.training.recipes import vmoe_b16_imagenet21k, vmoe_s32_ilsvrc2012
from vmoe_routers.training.settings import TrainSettings


def digits() -> Settings:
    """1,797 digits of 8 x 8 pixels, 8 experts, 20 epochs: minutes on two cores."""
    return Settings()


def fashion() -> Settings:
    """Fashion-MNIST with 32 experts, all variants and ablations: hours on two cores."""
    return Settings(
        data="/usr/share/datasets/fashion-mnist",
        transfer_data="digits",
        output=Path("fashion"),
        capacity_factors=[1.0, 0.5, 2.0],
        batch_priority=True,
        ablations=[name for name in ABLATIONS if name != "learning_rate"],
        seeds=5,
        holdout=10_000,
        epochs=1,
        learning_rates={"dense": 6e-3},  # from fashion_choose, which chose the default for all routers
        patch_size=4,
        mlp_ratio=4.0,
        num_experts=32,
    )


def fashion_choose() -> Settings:
    """Search of the learning rates of "fashion", on 10,000 held-out images."""
    return replace(
        fashion(),
        epochs=2,
        transfer_data=None,
        output=Path("fashion_choose"),
        learning_rates={},
        capacity_factors=[1.0],
        top_k=[1],
        plan_combine=False,
        batch_priority=False,
        ablations=["learning_rate"],
        seeds=1,
        choosing=True,
    )


def fashion_equal_aux_losses() -> Settings:
    """Softmax Expert Choice and Token Choice of "fashion" with equal auxiliary losses, on other seeds."""
    return replace(
        fashion(),
        transfer_data=None,
        output=Path("fashion_equal_aux_losses"),
        routers=["softmax_token_choice", "softmax_expert_choice"],
        capacity_factors=[1.0],
        top_k=[1],
        batch_priority=False,
        ablations=["aux_loss", "aux_loss_token_choice"],
        first_seed=5,  # "fashion", whose results suggested this comparison, has the seeds 0 to 4
        seeds=8,
        ablation_seeds=8,
    )


def cifar100() -> Settings:
    """CIFAR-100 with 32 experts for one GPU. torchvision downloads the images."""
    return Settings(
        data="torchvision:CIFAR100",
        output=Path("cifar100"),
        capacity_factors=[1.0, 0.5, 2.0],
        batch_priority=True,
        ablations=["learning_rate"],
        seeds=5,
        holdout=5_000,
        epochs=100,
        batch_size=256,
        learning_rate=1e-3,
        training={"hflip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.2},
        data_workers=8,
        shift=4,
        patch_size=4,
        width=384,
        mlp_ratio=4.0,
        depth=8,
        heads=6,
        num_experts=32,
        scale_init=40.0,
        device="cuda",
    )


# Optimisation of V-MoE's models trained from random weights (arXiv 2106.05974), as in `vmoe_routers.training.recipes`.
_REFERENCE = ("schedule", "warmup", "final_learning_rate", "weight_decay", "loss", "head_bias", "precision", "clip")
_REFERENCE += ("mixup", "rand_augment", "scale", "hflip", "normalization")


def _imagenet(recipe: Callable[[], TrainSettings], **sizes: Any) -> Settings:
    """Takes the hyperparameters of a training recipe. `sizes` has the data and the sizes of the model."""
    reference, default = recipe(), TrainSettings()
    chosen = {name: getattr(reference, name) for name in _REFERENCE}
    changed = {name: value for name, value in chosen.items() if value != getattr(default, name)}
    return Settings(
        capacity_factors=[1.0],
        holdout=10_000,
        epochs=reference.epochs,
        batch_size=reference.batch_size,
        learning_rate=reference.learning_rate,
        training=changed,
        stream=True,
        data_workers=16,
        image_size=224,
        shift=0,
        mlp_ratio=4.0,
        num_experts=32,
        device="cuda",
        **sizes,
    )


def imagenet1k_s32() -> Settings:
    """ViT-S/32 on ImageNet-1k in a folder imagenet1k with train/ and val/; hyperparameters of V-MoE."""
    sizes = {"patch_size": 32, "width": 512, "depth": 8, "heads": 8, "scale_init": 45.0}
    return _imagenet(vmoe_s32_ilsvrc2012, data="imagenet1k", output=Path("imagenet1k_s32"), **sizes)


_BASE = {"width": 768, "depth": 12, "heads": 12, "scale_init": 55.0}
_LARGE = {"width": 1024, "depth": 24, "heads": 16, "scale_init": 64.0}


def imagenet21k_b32() -> Settings:
    """ViT-B/32 on ImageNet-21k in a folder imagenet21k with train/ and val/; hyperparameters of V-MoE."""
    return _imagenet(vmoe_b16_imagenet21k, data="imagenet21k", output=Path("imagenet21k_b32"), patch_size=32, **_BASE)


def imagenet21k_b16() -> Settings:
    """ViT-B/16 on ImageNet-21k in a folder imagenet21k with train/ and val/; hyperparameters of V-MoE."""
    return _imagenet(vmoe_b16_imagenet21k, data="imagenet21k", output=Path("imagenet21k_b16"), patch_size=16, **_BASE)


def imagenet21k_l16() -> Settings:
    """ViT-L/16 on ImageNet-21k in a folder imagenet21k with train/ and val/; hyperparameters of V-MoE."""
    return _imagenet(vmoe_b16_imagenet21k, data="imagenet21k", output=Path("imagenet21k_l16"), patch_size=16, **_LARGE)


RECIPES: dict[str, Callable[[], Settings]] = {
    "digits": digits,
    "fashion": fashion,
    "fashion_choose": fashion_choose,
    "fashion_equal_aux_losses": fashion_equal_aux_losses,
    "cifar100": cifar100,
    "imagenet1k_s32": imagenet1k_s32,
    "imagenet21k_b32": imagenet21k_b32,
    "imagenet21k_b16": imagenet21k_b16,
    "imagenet21k_l16": imagenet21k_l16,
}
"""Recipes by name."""
