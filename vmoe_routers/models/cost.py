"""Cost of a model: slots, floating-point operations of a forward pass, parameters."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vmoe_routers.experts import Experts
from vmoe_routers.moe import MoEMlp


def cost(model: VisionTransformer | Eva) -> dict[str, float]:
    """Computes the cost per image of a `vit_moe` or upcycled model, or of a dense ViT or EVA of timm.

    A multiplication and an addition count as two operations. Norms, softmaxes, activations and the iterations of
    transport plans are not counted. Slots count whether filled or empty, for groups of `group_size` images and the
    capacity factor of the model's mode (training or eval). A router without `slots(tokens)` routes a group of
    zeros, and the capacity of that routing counts.

    Args:
        model: The model, which may be on the meta device.

    Returns:
        tokens: Tokens of an image, with class token and registers.
        slots: Slots of an image in a MoE layer, mean over the layers. In a dense model, its tokens.
        flops: Operations of the whole model.
        mlp_flops: Operations of the blocks' MLPs, experts and routers.
        parameters: All parameters.
        active_parameters: Parameters that the average token uses. The experts of a MoE layer count in proportion to
            the slots per token.

    Raises:
        TypeError: The model is of another kind, or has a convolutional network before the blocks.
    """
    if not isinstance(model, (VisionTransformer, Eva)) or not isinstance(model.patch_embed, PatchEmbed):
        raise TypeError(
            f"cost: model must be a ViT or EVA of timm, on patches of the image, got {type(model).__name__}"
        )
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    width = model.embed_dim
    flops = 2.0 * model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    # Layers that see only the pooled token: the head (two heads in a distilled model) and the layers before it.
    flops += 2.0 * (_weights(model) - _weights(model.blocks) - _weights(model.attn_pool))
    if model.attn_pool is not None:  # keys and values of every token, all other layers for one token, and the scores
        keys = _weights(model.attn_pool.get_submodule("kv"))
        flops += 2.0 * (tokens * keys + _weights(model.attn_pool) - keys) + 4.0 * tokens * width
    parameters = active = sum(p.numel() for p in model.parameters())
    mlp_flops, slots = 0.0, []
    for block in model.blocks:
        # Linear layers for queries, keys, values and output, then the two products with the scores.
        flops += 2.0 * tokens * _weights(block.get_submodule("attn")) + 4.0 * tokens * tokens * width
        mlp: Any = block.get_submodule("mlp")
        if not isinstance(mlp, MoEMlp):
            mlp_flops += 2.0 * tokens * _weights(mlp)
            continue
        layer_slots, layer_flops = _layer_cost(mlp, tokens)
        slots.append(layer_slots)
        mlp_flops += layer_flops
        experts = sum(p.numel() for p in mlp.experts.parameters())
        active -= experts * (1 - min(1.0, layer_slots / tokens / mlp.router.num_experts))
    return {
        "tokens": tokens,
        "slots": sum(slots) / len(slots) if slots else float(tokens),
        "flops": flops + mlp_flops,
        "mlp_flops": mlp_flops,
        "parameters": parameters,
        "active_parameters": active,
    }


def _weights(module: nn.Module | None) -> int:
    """Counts the multiplications of one token in the linear layers."""
    return 0 if module is None else sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _layer_cost(layer: MoEMlp, tokens: int) -> tuple[float, float]:
    """Counts slots and operations per image of a MoE layer."""
    router: Any = layer.router
    group = layer.group_size * tokens
    slots = router.num_experts * _slots_per_expert(layer, group) / layer.group_size
    flops = 2.0 * slots * _weights_of_an_expert(layer.experts)
    return slots, flops + (router.flops(group) / layer.group_size if hasattr(router, "flops") else 0.0)


def _slots_per_expert(layer: MoEMlp, tokens: int) -> int:
    """Returns the slots per expert for a group of `tokens` tokens, from `router.slots` or from a routing of zeros."""
    router: Any = layer.router
    if hasattr(router, "slots"):
        return router.slots(tokens)
    like = next(layer.experts.parameters())
    # Fork the random state: noise that the router draws must not change the caller's random numbers.
    with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
        return router(like.new_zeros(1, tokens, router.dim)).capacity


def _weights_of_an_expert(experts: Any) -> float:
    """Counts the multiplications of one slot in its expert."""
    if isinstance(experts, Experts):
        return experts.w1[0].numel() + experts.w2[0].numel()
    return _weights(experts) / experts.num_experts
