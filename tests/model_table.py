"""docs/models.md, what the registered models cost: `python tests/model_table.py` writes it."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from vmoe_routers.models import NAMES, cost

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
are rounded up for each expert (Token Choice to a multiple of 4), so the sparse models do more than a dense one where an
image has few tokens; with larger groups that falls away. Active parameters are those that a token meets on its way, on
average. Dense: the ViT of the same trunk.
"""


def row(name: str, label: str, **options: object) -> str:
    """A model's numbers; on the meta device, so that no memory is needed."""
    with torch.device("meta"):
        found = cost(timm.create_model(name, **options).eval())
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
    first = next(iter(ALIKE))
    for size in (name.removeprefix(f"{first}_") for name in NAMES if name.startswith(f"{first}_")):
        rows = [
            f"## {size}",
            "",
            "| | slots an image | parameters, M | active, M | GFLOPs an image |",
            "|---|---:|---:|---:|---:|",
            row(f"{first}_{size}", "dense", router=None),
            *(row(f"{router}_{size}", f"{label}: `{router}_{size}`", num_experts=32) for router, label in ALIKE.items()),
        ]
        parts.append("\n".join(rows) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"written: {PAGE}")
