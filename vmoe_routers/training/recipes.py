"""Recipes: named settings of a training. Flags and YAML files override them.

The recipes of the reference have the hyperparameters that the authors published (arXiv 2106.05974, 2308.00951). They
were not run to their end here. The authors' results also need the authors' data.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vmoe_routers.training.settings import TrainSettings
from vmoe_routers.training.torchvision_data import SMALL_SETS


def digits() -> TrainSettings:
    """Small Soft MoE on 8 x 8 digits, in about a minute on two cores."""
    return TrainSettings(
        data="digits",
        model_args={"patch_size": 2, "embed_dim": 64, "depth": 4, "num_heads": 4, "pos_embed_std": 1.0}
        | {"slots_per_expert": 2, "scale_init": 16.0},
        router="soft",
        num_experts=8,
        scale=None,
        hflip=0.0,
        shift=1,
        crop_pct=1.0,
        normalization="none",
        learning_rate=2e-3,
    )


def small() -> TrainSettings:
    """Small Token Choice model on images of 28 or 32 pixels: MNIST, Fashion-MNIST, CIFAR."""
    return TrainSettings(
        model_args={"patch_size": 4, "embed_dim": 128, "depth": 6, "num_heads": 4, "pos_embed_std": 1.0},
        router="softmax_token_choice",
        num_experts=8,
        group_size=8,
        scale=None,
        hflip=0.0,
        shift=2,
        crop_pct=1.0,
        normalization="none",
        epochs=20,
    )


def photos() -> TrainSettings:
    """ViT-S/16 with Soft MoE on photographs of 224 pixels, from random weights."""
    return TrainSettings(
        model="soft_moe_small_patch16_224",
        epochs=100,
        batch_size=256,
        warmup=0.05,
        rand_augment="rand-m9-mstd0.5-inc1",
        mixup=0.2,
        label_smoothing=0.1,
        precision="bfloat16",
    )


def finetune() -> TrainSettings:
    """timm's pretrained ViT-S/16, upcycled and fine-tuned with layer-wise decay on photographs."""
    return TrainSettings(
        model="vit_small_patch16_224",
        pretrained=True,
        upcycle="softmax_token_choice",
        num_experts=8,
        group_size=8,
        epochs=20,
        batch_size=256,
        learning_rate=5e-4,
        layer_decay=0.75,
        warmup=0.1,
        rand_augment="rand-m9-mstd0.5-inc1",
        label_smoothing=0.1,
        ema=0.9998,
        precision="bfloat16",
    )


def _vmoe(**changes) -> TrainSettings:
    """Common part of V-MoE's recipes (arXiv 2106.05974)."""
    common = {
        "model": "softmax_token_choice_moe_base_patch16_224",
        "model_args": {"moe_blocks": "every_2", "global_pool": "token"},
        "num_experts": 8,
        "top_k": 2,
        "capacity_factor": 1.05,
        "group_size": 8,
        "scale": (0.05, 1.0),
        "final_learning_rate": 1e-5,
        "schedule": "linear",
        "warmup": 10_000.0,
        "weight_decay": 0.1,
        "loss": "sigmoid",
        "precision": "bfloat16",
        "parallel": "fsdp",
    }
    return TrainSettings(**{**common, **changes})


def vmoe_b16_imagenet21k() -> TrainSettings:
    """V-MoE-B/16 on ImageNet-21k: 300 epochs with 4,096 images per step."""
    return _vmoe(
        epochs=300, batch_size=4096, learning_rate=8e-4, rand_augment="rand-n2-m20", mixup=0.5, head_bias=-10.0
    )


def vmoe_s32_ilsvrc2012() -> TrainSettings:
    """V-MoE-S/32 with MoE layers in the last two odd blocks, on ILSVRC-2012: 300 epochs of 8,192 images per step."""
    return _vmoe(
        model="vit_moe",
        model_args={"patch_size": 32, "embed_dim": 512, "depth": 8, "num_heads": 8, "moe_blocks": [5, 7]}
        | {"global_pool": "token"},
        router="softmax_token_choice",
        epochs=300,
        batch_size=8192,
        learning_rate=3e-3,
        rand_augment="rand-n2-m10",
        mixup=0.2,
        head_bias=-6.9,
    )


def vmoe_finetune_ilsvrc2012() -> TrainSettings:
    """Fine-tuning of a V-MoE on ILSVRC-2012 at 384 pixels: SGD, 8 epochs (about 10,000 steps) of 1,024 images."""
    return _vmoe(
        model="",
        model_args={},
        image_size=384,
        num_experts=None,
        optimizer="sgd",
        learning_rate=3e-3,
        schedule="cosine",
        warmup=500.0,
        weight_decay=0.0,
        clip=10.0,
        loss="softmax",
        epochs=8,
        batch_size=1024,
    )


def soft_moe_b16() -> TrainSettings:
    """Soft MoE-B/16 with 128 experts of one slot each (arXiv 2308.00951)."""
    return TrainSettings(
        model="soft_moe_base_patch16_224",
        model_args={"qk_norm": True, "slots_per_expert": 1},
        num_experts=128,
        scale=(0.05, 1.0),
        schedule="rsqrt",
        timescale=10_000,
        warmup=10_000.0,
        cooldown=50_000.0,
        weight_decay=0.03,
        head_weight_decay=3.0,
        loss="sigmoid",
        head_bias=-10.0,
        epochs=300,
        batch_size=4096,
        precision="bfloat16",
        parallel="fsdp",
    )


RECIPES: dict[str, Callable[[], TrainSettings]] = {
    function.__name__: function
    for function in (
        digits,
        small,
        photos,
        finetune,
        vmoe_b16_imagenet21k,
        vmoe_s32_ilsvrc2012,
        vmoe_finetune_ilsvrc2012,
        soft_moe_b16,
    )
}
"""Functions that return the settings, by name."""


def recipe_for(data: str) -> str:
    """Returns the name of the default recipe for a data set."""
    if data == "digits":
        return "digits"
    folder = Path(data)
    is_idx = folder.is_dir() and any(folder.glob("*-idx?-ubyte*"))
    return "small" if is_idx or data in [f"torchvision:{name}" for name in SMALL_SETS] else "photos"
