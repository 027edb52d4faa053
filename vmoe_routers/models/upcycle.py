"""upcycle: turns a trained dense vision transformer into a mixture of experts (arXiv 2212.05055)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from vmoe_routers.models.blocks import pass_masks
from vmoe_routers.models.dense import find_blocks, parts_of
from vmoe_routers.models.vit import check_router, moe_block_indices, needs_num_tokens, plain
from vmoe_routers.moe import MoEMlp, no_weight_decay
from vmoe_routers.ops._checks import Check, exporting
from vmoe_routers.routers import RouterFactory

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
    """Replaces the MLPs of some blocks, in place, by MoE layers whose experts start as copies of the replaced MLP.

    Attention, layer scale, register tokens and head do not change. The weights of the routers are drawn at random.

    In timm's VisionTransformer, Eva and NaFlexVit, tokens that the attention mask hides from every query (padding) are
    not routed. `model.no_weight_decay`, which timm's optimizer factory calls, also names biases and norms of the
    experts.

    If the weights of a token's experts sum to 1, the layer maps the token as the dense MLP did. So the model starts
    with the outputs of the dense model if

    - the router is sparse, with ``renormalize=True``,
    - the experts take every token: `capacity_factor` is large enough (in Expert Choice, ``capacity_factor=num_experts``
      gives every expert a slot for every token), and
    - `noise` is 0.

    Without `renormalize`, the layer scales the output of the MLP by the sum of the token's gates. With Soft MoE the
    outputs differ from the dense model's from the start, because the experts compute mixtures of tokens.

    Args:
        model: A vision transformer of timm (ViT, DeiT, DINOv2, DINOv3, EVA-02, ...), of torchvision, or of Hugging Face
            transformers 5.10 or later (ViT, DeiT, DINOv2, DINOv3, SigLIP, CLIP). The model must have one list of
            blocks. The `mlp` of a block must be an MLP of that package, gated or not, with a LayerNorm inside or no
            norm. For a model of several towers give the vision tower: ``upcycle(clip.vision_model, ...)``.
        router: One of `vmoe_routers.ROUTERS`, or a function ``(dim, num_experts)`` that makes a router, called once per
            MoE layer.
        num_experts: E.
        blocks: The blocks to replace, as in `moe_block_indices`.
        group_size: Images that are routed together.
        noise: Adds normal noise to the weights of every expert, with this multiple of the weight's standard deviation,
            so that experts differ from the start. With 0, experts become different only because they get different
            tokens.
        router_options: Options of `vmoe_routers.create_router`.

    Returns:
        `model`. Its attribute `upcycled`, or `moe_config` of a `vit_moe` model, describes the replaced MLPs, for
            `vmoe_routers.checkpoints.save_pretrained`.

    Raises:
        TypeError, ValueError: The model has no blocks or several lists of blocks, an MLP has convolutions or another
            norm than LayerNorm, or options do not fit. The model is unchanged.
    """
    check = Check("upcycle")
    check_router(check, router)
    num_experts = check.integer("num_experts", num_experts, 1)
    group_size = check.integer("group_size", group_size, 1)
    noise = check.number("noise", noise, zero=True)
    if "experts" in router_options:
        raise TypeError("upcycle: experts is not an option: they are copies of the model's MLPs")
    router_options = {name: plain(value) for name, value in router_options.items()}
    name, found = find_blocks(model)
    if needs_num_tokens(router, router_options):
        router_options["num_tokens"] = group_size * _tokens(model)
    chosen = moe_block_indices(len(found), blocks)
    layers = [_layer(found[i], f"{name}[{i}]", router, num_experts, group_size, noise, router_options) for i in chosen]
    for i, layer in zip(chosen, layers, strict=True):
        found[i].mlp = layer
        pass_masks(found[i])
        if type(found[i]).__module__.startswith("transformers."):
            found[i].register_forward_pre_hook(_refuse_mask_of_block, with_kwargs=True)
    if type(model).__module__.startswith("transformers."):
        model.register_forward_pre_hook(_refuse_mask, with_kwargs=True)
    named = set(getattr(model, "no_weight_decay", set)())  # timm's optimizer factory asks for these names
    if not no_weight_decay(model) <= named:
        setattr(model, "no_weight_decay", partial(set, named | no_weight_decay(model)))  # noqa: B010
    # Describe the upcycled model, for save_pretrained.
    options = {"router": router, "num_experts": num_experts, "group_size": group_size, **router_options}
    config: Any = getattr(model, "moe_config", None)
    if config is None:
        setattr(model, "upcycled", [*getattr(model, "upcycled", ()), {**options, "blocks": list(chosen)}])  # noqa: B010
    elif config["router"] is None:
        setattr(model, "moe_config", {**config, **options, "moe_blocks": list(chosen)})  # noqa: B010
    return model


def _refuse_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses the padding mask of a model or block of transformers, which does not reach the MLPs."""
    if kwargs.get("attention_mask") is not None:
        raise ValueError(
            f"{type(module).__name__}: attention_mask must be None after upcycle: the MoE layers would route padding"
        )


def _refuse_mask_of_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # In an export, a model without a mask passes its blocks a mask that hides nothing.
    if not exporting():
        _refuse_mask(block, args, {"attention_mask": args[1]} if len(args) > 1 else kwargs)


def _tokens(model: nn.Module) -> int:
    if hasattr(model, "seq_length"):  # torchvision
        return model.seq_length  # type: ignore[return-value]
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is None:
        raise ValueError(
            "upcycle: capacity_factor of Soft MoE needs num_tokens, the tokens of a group with class token and "
            f"registers, because {type(model).__name__} does not have their number"
        )
    return patches + getattr(model, "num_prefix_tokens", 0)


def _layer(
    block: nn.Module, where: str, router: Any, num_experts: int, group_size: int, noise: float, options: dict[str, Any]
) -> MoEMlp:
    """Makes the MoE layer that replaces the MLP of a block."""
    mlp: Any = getattr(block, "mlp", None)
    parts = parts_of(mlp, where)
    weights, biases, second, norm = parts.weights, parts.biases, parts.second, parts.norm
    layer: Any = MoEMlp(
        weights[0].shape[1],
        second.in_features,
        second.out_features,
        act_layer=parts.activation,
        drop=parts.drop,
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
