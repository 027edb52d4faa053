"""docs/models.md, what the registered models cost: `python tests/model_table.py` writes it."""

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
# Routers that make as many slots cost as much: the plans' iterations are not counted.
ALIKE = {
    "softmax_token_choice": "Softmax and Sinkhorn Token Choice, K = 1",
    "softmax_expert_choice": "Softmax, Sinkhorn and Sparsity-constrained Expert Choice",
    "soft": "Soft MoE, as many slots as tokens",
}
HEAD = f"""# Models

Written by `{COMMAND}` with `vmoe_routers.models.cost`: the models that `timm.create_model` knows once
`vmoe_routers.models` is imported, with 32 experts, capacity factor 1, MoE layers in the last half of the blocks,
`group_size=1`, images of 224 x 224 and 1,000 classes. `timm.create_model("soft_moe_base_patch16_224", num_experts=32)`
makes one; every keyword of `vit_moe` changes it. None comes with weights: upcycle a dense ViT, convert a checkpoint,
or train.

FLOPs are of the forward pass per image, two for a multiplication with its addition, of every slot, filled or not. Slots
are rounded for each expert: to the nearest in Expert Choice, up to a multiple of 4 in Token Choice, which does more
than the dense ViT where an image has few tokens for its 32 experts; in larger groups that falls away. Active parameters
are those that a token meets on its way, on average. Dense: the ViT of the same trunk.
"""


def row(label: str, create: Callable[..., MoEVisionTransformer], *arguments: str, **options: Any) -> str:
    """A model's numbers; on the meta device, so that no memory is needed."""
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
    """The whole of it."""
    parts = [HEAD]
    for (size, patches), letters in zip(PATCHES.items(), SIZES, strict=True):
        for patch in patches:
            rows = [
                f"## {letters}/{patch}",
                "",
                "| | slots an image | parameters, M | active, M | GFLOPs an image |",
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
