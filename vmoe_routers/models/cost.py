"""What a model computes and holds: slots, floating-point operations of a forward pass, parameters."""

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
    """Cost per image of a `vit_moe` or upcycled model, or of a dense ViT or EVA of timm, worked out from its sizes.

    A multiplication and an addition are two operations; norms, softmaxes, activations and the plans' iterations are
    not counted. Slots are those that there are in groups of the layer's `group_size` images, filled or not, by the
    capacity factor of the mode, training or eval, that the model is in. A router without `slots(tokens)` routes a group
    of zeros, whose routing has the slots. The model may be on the meta device.

    Returns:
        tokens            of an image, class token and registers among them
        slots             of an image in a MoE layer, mean over the layers; a dense model: the tokens
        flops             of the whole model
        mlp_flops         of them those of the blocks' MLPs, experts and routers
        parameters        all
        active_parameters those that a token meets on its way: of a MoE layer's experts as many as a token has slots, on
                          average

    Raises:
        TypeError: a model of another kind, or one with a convolutional network in front.
    """
    if not isinstance(model, (VisionTransformer, Eva)) or not isinstance(model.patch_embed, PatchEmbed):
        raise TypeError(
            f"cost: model must be a ViT or EVA of timm, on patches of the image, got {type(model).__name__}"
        )
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    width = model.embed_dim
    flops = 2.0 * model.patch_embed.num_patches * model.patch_embed.proj.weight.numel()
    # of the pooled token alone: the head, or the heads where it is distilled, and what is in front of them
    flops += 2.0 * (_weights(model) - _weights(model.blocks) - _weights(model.attn_pool))
    if model.attn_pool is not None:  # keys and values of every token, all else of one; scores and their sums
        keys = _weights(model.attn_pool.get_submodule("kv"))
        flops += 2.0 * (tokens * keys + _weights(model.attn_pool) - keys) + 4.0 * tokens * width
    parameters = active = sum(p.numel() for p in model.parameters())
    mlp_flops, slots = 0.0, []
    for block in model.blocks:
        # queries, keys, values and the output; scores and their sums
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
    """Multiplications of one token in the linear layers."""
    return 0 if module is None else sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _layer_cost(layer: MoEMlp, tokens: int) -> tuple[float, float]:
    """Slots and operations per image of a MoE layer."""
    router: Any = layer.router
    group = layer.group_size * tokens
    slots = router.num_experts * _slots_per_expert(layer, group) / layer.group_size
    flops = 2.0 * slots * _weights_of_an_expert(layer.experts)
    return slots, flops + (router.flops(group) / layer.group_size if hasattr(router, "flops") else 0.0)


def _slots_per_expert(layer: MoEMlp, tokens: int) -> int:
    """Slots per expert for a group of `tokens` tokens: the router's `slots`, or the capacity of a routing of zeros."""
    router: Any = layer.router
    if hasattr(router, "slots"):
        return router.slots(tokens)
    like = next(layer.experts.parameters())
    # The router may draw noise, which the caller's random numbers must not depend on.
    with torch.no_grad(), torch.random.fork_rng([like.device] if like.is_cuda else []):
        return router(like.new_zeros(1, tokens, router.dim)).capacity


def _weights_of_an_expert(experts: Any) -> float:
    """Multiplications of one slot in its expert."""
    if isinstance(experts, Experts):
        return experts.w1[0].numel() + experts.w2[0].numel()
    return _weights(experts) / experts.num_experts
