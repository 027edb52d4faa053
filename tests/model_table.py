"""Makes the tables of docs/models.md, the cost of the registered models: `python tests/model_table.py` writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from vmoe_routers.models import SIZES, MoEVisionTransformer, cost, vit_moe
from vmoe_routers.models.zoo import PATCHES

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
COMMAND = "python tests/model_table.py"
# Routers with equally many slots have the same cost, because iterations of plans are not counted.
ALIKE = {
    "softmax_token_choice": "Softmax and Sinkhorn Token Choice, K = 1",
    "softmax_expert_choice": "Softmax, Sinkhorn and Sparsity-constrained Expert Choice",
    "soft": "Soft MoE, as many slots as tokens",
}
MARK = f"<!-- models: the rest is written by {COMMAND} -->"
HEAD = f"""{MARK}

## What the named models cost

The tables list the models whose names `timm.create_model` knows once `vmoe_routers.models` is imported.
`timm.create_model("soft_moe_base_patch16_224", num_experts=32)` makes such a model, and accepts every keyword of
`vit_moe`. `vmoe_routers.models.cost` computed the numbers, for 32 experts, capacity factor 1, MoE layers in the last
half of the blocks, `group_size=1`, images of 224 x 224 and 1,000 classes.

- *dense* is the ViT without experts.
- *Active* parameters are the parameters that process a token, on average.
- *FLOPs* are counted for a forward pass of one image. A multiply-add counts as two. Empty slots count.

Capacity is rounded per expert: to the nearest integer in Expert Choice, up to a multiple of 4 in Token Choice. If an
image has few tokens for 32 experts, Token Choice therefore costs more than the dense ViT. Larger groups remove the
difference.
"""


def row(label: str, create: Callable[..., MoEVisionTransformer], *arguments: str, **options: Any) -> str:
    """Returns a model's numbers. The model is on the meta device, so that it needs no memory."""
    with torch.device("meta"):
        found = cost(create(*arguments, **options).eval())
    cells = [
        label,
        f"{found['slots']:.0f}",
        f"{found['parameters'] / 1e6:.1f}",
        f"{found['active_parameters'] / 1e6:.1f}",
        f"{found['flops'] / 1e9:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def page() -> str:
    """Makes the page: the handwritten text before the mark, and the tables."""
    parts = [PAGE.read_text().split(MARK)[0] + HEAD]
    for (size, patches), letters in zip(PATCHES.items(), SIZES, strict=True):
        for patch in patches:
            rows = [
                f"### {letters}/{patch}",
                "",
                "| | slots per image | parameters, M | active, M | GFLOPs per image |",
                "|---|---:|---:|---:|---:|",
                row("dense", vit_moe, patch_size=patch, **SIZES[letters], router=None),
            ]
            for router, label in ALIKE.items():
                name = f"{router}_moe_{size}_patch{patch}_224"
                rows.append(row(f"{label}: `{name}`", timm.create_model, name, num_experts=32))
            parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
