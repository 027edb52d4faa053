"""Recipes of a study: named settings. Options override them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.settings import Settings


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
        epochs=2,
        patch_size=4,
        mlp_ratio=4.0,
        num_experts=32,
    )


def fashion_choose() -> Settings:
    """Search of the learning rates of "fashion", on 10,000 held-out images."""
    return replace(
        fashion(),
        transfer_data=None,
        output=Path("fashion_choose"),
        capacity_factors=[1.0],
        top_k=[1],
        plan_combine=False,
        batch_priority=False,
        ablations=["learning_rate"],
        seeds=1,
        choosing=True,
    )


RECIPES: dict[str, Callable[[], Settings]] = {
    "digits": digits,
    "fashion": fashion,
    "fashion_choose": fashion_choose,
}
"""Recipes by name."""
