"""upcycle: turns a trained dense vision transformer into a mixture of experts (arXiv 2212.05055)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar, cast

import torch
from timm.layers.mlp import Mlp
from torch import nn

from vmoe_routers.models.vit import moe_block_indices, needs_num_tokens
from vmoe_routers.moe import MoEMlp
from vmoe_routers.ops._checks import Check
from vmoe_routers.routers import ROUTERS, RouterFactory

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def upcycle(
    model: Model,
    *,
    router: str | RouterFactory,
    num_experts: int,
    blocks: str | Iterable[int] = "last_half",
    group_size: int = 1,
    noise: float = 0.0,
    **router_options: Any,
) -> Model:
    """Replaces the MLPs of some blocks, in place, by MoE layers whose experts all start as that MLP.

    Attention, layer scale, register tokens and head do not change. The weights of the routers are drawn. If experts
    took a token with weights that sum to 1, the layer maps the token as the dense MLP did. So the model starts with the
    outputs of the dense model if

    - the router is sparse, with ``renormalize=True``,
    - the experts take every token: `capacity_factor` is large enough (for Expert Choice ``capacity_factor=num_experts``
      gives as many slots as tokens), and
    - `noise` is 0.

    Without `renormalize`, the layer scales the output of the MLP by the sum of the token's gates. With Soft MoE the
    outputs differ from the start, because its experts compute mixtures of tokens.

    Args:
        model: a timm VisionTransformer, or another with ``model.blocks[i].mlp`` being a timm `Mlp` (DeiT, DINOv2 with
            layer scale, register tokens, ...).
        router: One of `vmoe_routers.ROUTERS`, or a function ``(dim, num_experts)`` that makes a router, called once per
            MoE layer.
        num_experts: E.
        blocks: The blocks to replace, as in `moe_block_indices`.
        group_size: Images that are routed together.
        noise: Adds normal noise to the weights of every expert, with this multiple of the weight's standard deviation,
            so that experts differ from the start. With 0, only the routers' gradients make the experts differ.
        router_options: Options of `vmoe_routers.create_router`.

    Returns:
        `model`.

    Raises:
        TypeError, ValueError: blocks or MLPs of another kind (SwiGLU, a norm inside), or options that do not fit. The
            model is then as it was.
    """
    check = Check("upcycle")
    if not callable(router) or isinstance(router, nn.Module):
        check.choice("router", router, ROUTERS)
    num_experts = check.integer("num_experts", num_experts, 1)
    group_size = check.integer("group_size", group_size, 1)
    noise = check.number("noise", noise, zero=True)
    found = getattr(model, "blocks", None)
    if not isinstance(found, (nn.Sequential, nn.ModuleList)) or not len(found):
        raise TypeError(f"upcycle: model must have transformer blocks as model.blocks, got {type(model).__name__}")
    if needs_num_tokens(router, router_options):
        router_options["num_tokens"] = group_size * _tokens(model)
    chosen = moe_block_indices(len(found), blocks)
    layers = [_layer(found[i], f"blocks[{i}]", router, num_experts, group_size, noise, router_options) for i in chosen]
    for i, layer in zip(chosen, layers, strict=True):
        found[i].mlp = layer
    config: Any = getattr(model, "moe_config", None)
    if config is not None and config["router"] is None:  # describe the upcycled model
        moe = {"router": router, "num_experts": num_experts, "moe_blocks": list(chosen), "group_size": group_size}
        setattr(model, "moe_config", {**config, **moe, **router_options})  # noqa: B010
    return model


def _tokens(model: nn.Module) -> int:
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is None:
        raise ValueError(
            "upcycle: capacity_factor of Soft MoE needs num_tokens, because the model has no patch_embed.num_patches"
        )
    return patches + getattr(model, "num_prefix_tokens", 0)


def _layer(
    block: nn.Module, where: str, router: Any, num_experts: int, group_size: int, noise: float, options: dict[str, Any]
) -> MoEMlp:
    """Makes the MoE layer that replaces the MLP of a block."""
    mlp: Any = getattr(block, "mlp", None)
    if type(mlp) is not Mlp or not isinstance(mlp.fc1, nn.Linear):
        raise TypeError(
            f"upcycle: {where}.mlp must be timm's Mlp (two linear layers and an activation), got {type(mlp).__name__}"
            + ("; gated MLPs such as SwiGLU have no expert here" if "glu" in type(mlp).__name__.lower() else "")
        )
    if not isinstance(mlp.norm, nn.Identity):
        raise ValueError(f"upcycle: {where}.mlp has a norm inside, which experts have not")
    first, second = mlp.fc1, cast(nn.Linear, mlp.fc2)
    if mlp.drop1.p != mlp.drop2.p:
        raise ValueError(f"upcycle: {where}.mlp has two dropout rates, {mlp.drop1.p} and {mlp.drop2.p}, wanted one")
    if (first.bias is None) != (second.bias is None):
        raise ValueError(f"upcycle: {where}.mlp has a bias in one of its layers, wanted in both or none")
    layer: Any = MoEMlp(
        first.in_features,
        first.out_features,
        second.out_features,
        act_layer=lambda: copy.deepcopy(mlp.act),
        drop=mlp.drop1.p,
        num_experts=num_experts,
        router=router,
        group_size=group_size,
        bias=first.bias is not None,
        device=first.weight.device,
        dtype=first.weight.dtype,
        **options,
    ).train(mlp.training)
    experts = layer.experts
    for ours, theirs in ((experts.w1, first.weight.T), (experts.w2, second.weight.T)):
        ours.copy_(theirs.expand_as(ours))
        if noise > 0:
            ours.add_(torch.randn_like(ours), alpha=noise * float(theirs.std()))
    if first.bias is not None and second.bias is not None:
        experts.b1.copy_(first.bias.expand_as(experts.b1))
        experts.b2.copy_(second.bias.expand_as(experts.b2))
    return layer
