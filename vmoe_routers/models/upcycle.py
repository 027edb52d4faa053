"""upcycle: turns a trained dense vision transformer into a mixture of experts (arXiv 2212.05055)."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from timm.layers.mlp import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

from vmoe_routers.models.vit import moe_block_indices, needs_num_tokens
from vmoe_routers.moe import MoEMlp
from vmoe_routers.ops._checks import Check
from vmoe_routers.routers import ROUTERS, RouterFactory

Model = TypeVar("Model", bound=nn.Module)

# timm's MLPs that can become experts, with the names of their linear layers.
_LINEAR: dict[type[nn.Module], tuple[str, ...]] = {
    Mlp: ("fc1", "fc2"),
    GluMlp: ("fc1", "fc2"),
    SwiGLU: ("fc1_g", "fc1_x", "fc2"),
}


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
        model: A VisionTransformer or Eva of timm, or another model whose ``blocks[i].mlp`` is timm's `Mlp`, `GluMlp`
            (also as `SwiGLUPacked`) or `SwiGLU`, with a LayerNorm inside or no norm: DeiT, DINOv2, DINOv3, EVA-02, ...
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
        TypeError, ValueError: blocks or MLPs of another kind (convolutions, another norm than LayerNorm), or options
            that do not fit. The model is then as it was.
    """
    check = Check("upcycle")
    if not callable(router) or isinstance(router, nn.Module):
        check.choice("router", router, ROUTERS)
    num_experts = check.integer("num_experts", num_experts, 1)
    group_size = check.integer("group_size", group_size, 1)
    noise = check.number("noise", noise, zero=True)
    if "experts" in router_options:
        raise TypeError("upcycle: experts is not an option: they are copies of the model's MLPs")
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
    linear = [getattr(mlp, name) for name in _LINEAR.get(type(mlp), ())]
    if not linear or not all(isinstance(module, nn.Linear) for module in linear):
        raise TypeError(
            f"upcycle: {where}.mlp must be timm's Mlp, GluMlp or SwiGLU of linear layers, got {type(mlp).__name__}"
        )
    norm = None if isinstance(mlp.norm, nn.Identity) else mlp.norm
    if norm is not None and not isinstance(norm, nn.LayerNorm):
        raise ValueError(f"upcycle: {where}.mlp has a {type(norm).__name__} inside, wanted a LayerNorm or no norm")
    if mlp.drop1.p != mlp.drop2.p:
        raise ValueError(f"upcycle: {where}.mlp has two dropout rates, {mlp.drop1.p} and {mlp.drop2.p}, wanted one")
    weights, biases = _before_activation(mlp)
    if len({bias is None for bias in biases}) > 1:
        raise ValueError(f"upcycle: {where}.mlp has a bias in one of fc1_g and fc1_x, wanted in both or none")
    second = mlp.fc2
    layer: Any = MoEMlp(
        linear[0].in_features,
        second.in_features,
        second.out_features,
        act_layer=lambda: copy.deepcopy(mlp.act),
        drop=mlp.drop1.p,
        num_experts=num_experts,
        router=router,
        group_size=group_size,
        bias=(biases[0] is not None, second.bias is not None),
        glu=len(weights) == 2,
        norm_layer=None if norm is None else lambda *_, **__: norm,
        device=second.weight.device,
        dtype=second.weight.dtype,
        **options,
    ).train(mlp.training)
    experts = layer.experts
    for ours, theirs in zip(
        (*experts.w1.chunk(len(weights), dim=2), experts.w2), (*weights, second.weight), strict=True
    ):
        ours.copy_(theirs.T.expand_as(ours))
        if noise > 0:
            ours.add_(torch.randn_like(ours), alpha=noise * float(theirs.std()))
    if experts.b1 is not None:
        experts.b1.copy_(torch.cat(biases).expand_as(experts.b1))
    if experts.b2 is not None:
        experts.b2.copy_(second.bias.expand_as(experts.b2))
    if norm is not None:
        for name, theirs in norm.named_parameters():
            ours = experts.norm.get_parameter(name)
            ours.copy_(theirs.expand_as(ours))
    return layer


def _before_activation(mlp: Any) -> tuple[list[Tensor], list[Any]]:
    """Finds the weights [F, D] and biases ([F] or None) before the activation: one of each, or gate and value."""
    if isinstance(mlp, SwiGLU):
        return [mlp.fc1_g.weight, mlp.fc1_x.weight], [mlp.fc1_g.bias, mlp.fc1_x.bias]
    weight, bias = mlp.fc1.weight, mlp.fc1.bias
    if not isinstance(mlp, GluMlp):
        return [weight], [bias]
    order = -1 if mlp.gate_last else 1
    return list(weight.chunk(2))[::order], ([None, None] if bias is None else list(bias.chunk(2))[::order])
