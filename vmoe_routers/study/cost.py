"""What a model really computes: slots and floating-point operations of a forward pass."""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vmoe_routers.moe import MoEMlp
from vmoe_routers.routers import SoftRouter


def cost(model: VisionTransformer) -> dict[str, float]:
    """Cost per image of a `vit_moe` model, after a forward pass.

    A multiplication and an addition are two operations; norms, softmaxes, activations and
    the plans' iterations are not counted. Slots are those computed, filled or not.

    Returns:
        slots: per MoE layer, mean (a dense model: the tokens); mlp_flops: of the blocks' MLPs,
        experts and routers; flops: of the whole model; parameters.
    """
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    width = model.embed_dim
    patch = model.patch_embed.proj.weight
    head = sum(p.numel() for p in model.head.parameters() if p.ndim == 2)
    flops = 2.0 * (model.patch_embed.num_patches * patch.numel() + head)
    mlp_flops, slots = 0.0, []
    for block in model.blocks:
        # queries, keys, values and the output; scores and their sums
        flops += 2 * tokens * 4 * width * width + 4 * tokens * tokens * width
        layer_slots, layer_flops = _mlp_cost(block.get_submodule("mlp"), tokens, width)
        mlp_flops += layer_flops
        if isinstance(block.mlp, MoEMlp):
            slots.append(layer_slots)
    return {
        "slots": sum(slots) / len(slots) if slots else float(tokens),
        "mlp_flops": mlp_flops,
        "flops": flops + mlp_flops,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _mlp_cost(mlp: nn.Module, tokens: int, width: int) -> tuple[float, float]:
    """Slots and operations per image of one block's MLP."""
    if not isinstance(mlp, MoEMlp):
        return tokens, 2.0 * tokens * sum(m.weight.numel() for m in mlp.modules() if isinstance(m, nn.Linear))
    routing = mlp.routings[0]
    images = routing.num_tokens / tokens
    slots = routing.num_experts * routing.capacity / images
    expert = mlp.experts.w1[0].numel() + mlp.experts.w2[0].numel()
    if isinstance(mlp.router, SoftRouter):
        # logits, and the two mixtures
        return slots, 2.0 * slots * expert + 6.0 * tokens * slots * width
    return slots, 2.0 * slots * expert + 2.0 * tokens * routing.num_experts * width
