"""Prints the computed cost of the study's recipes, as a table for docs/study.md.

The cost is a lower bound from the FLOPs of the models. No image is read, and nothing is measured. A training step is
counted as three forward passes.
"""

from __future__ import annotations

import argparse
from collections import Counter

import torch

from vmoe_routers.models.cost import cost
from vmoe_routers.study.images import Streamed
from vmoe_routers.study.recipes import RECIPES
from vmoe_routers.study.variants import make, planned_runs

PEAK = 989e12  # dense bfloat16 FLOP/s of an H100 SXM, from its data sheet
SHARE = 0.4  # assumed share of the peak
IMAGES = {  # training images, size, channels, classes
    "cifar100": (50_000, 32, 3, 100),
    "imagenet1k_s32": (1_281_167, 224, 3, 1_000),
    "imagenet21k_b32": (14_197_122, 224, 3, 21_843),
    "imagenet21k_b16": (14_197_122, 224, 3, 21_843),
    "imagenet21k_l16": (14_197_122, 224, 3, 21_843),
}


def row(name: str) -> list[str]:
    """Computes the cells of a recipe's line."""
    count, size, channels, classes = IMAGES[name]
    settings = RECIPES[name]()
    nothing = torch.empty(0)
    data = Streamed(name, [], [], nothing, nothing, classes, size, channels)  # type: ignore[arg-type]
    flops, runs, largest = 0.0, 0, 0.0
    repeated = Counter(variant for variant, _ in planned_runs(settings))
    for variant, repeats in repeated.items():
        chosen = variant.settings(settings)
        with torch.device("meta"):
            found = cost(make(variant, chosen, data))
        flops += repeats * 3 * found["flops"] * (count - settings.holdout) * chosen.epochs
        largest = max(largest, found["parameters"])
        runs += repeats
    return [name, str(runs), str(settings.epochs), f"{largest / 1e6:,.0f} M", f"{flops / PEAK / SHARE / 3600:,.0f}"]


def table() -> str:
    """Returns the table in Markdown."""
    lines = ["| recipe | runs | epochs | largest model | GPU-hours |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row(name))} |" for name in IMAGES)])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(table())
