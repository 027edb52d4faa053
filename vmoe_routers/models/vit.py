"""ViT-MoE: timm's VisionTransformer with MoE layers in place of the MLPs of some blocks.

The model is a `timm.models.VisionTransformer` in which the placement rule chooses the blocks whose `mlp` is a
`MoEMlp`. Code for timm's model (feature extraction, checkpointing, parameter groups of optimisers) works on this model
too. In addition, its forward takes a padding mask (`MoEVisionTransformer`).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from inspect import signature
from numbers import Integral, Number
from typing import Any, cast

import torch
from torch import nn

from vmoe_routers.experts import GeluTanh
from vmoe_routers.models.blocks import MoEBlock
from vmoe_routers.models.init import init_trunk
from vmoe_routers.models.transformer import MoEVisionTransformer
from vmoe_routers.moe import MoEMlp
from vmoe_routers.ops._checks import Check
from vmoe_routers.options import did_you_mean
from vmoe_routers.routers import ROUTERS, RouterFactory, router_options

SIZES: dict[str, dict[str, int]] = {
    "Ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "S": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "B": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "L": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "H": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}
"""Arguments of the sizes in arXiv 2010.11929, table 1: ``vit_moe(**SIZES["S"], patch_size=16)``."""

POOLINGS = ("avg", "token", "map")
POSITIONS = ("learned", "sincos")

_DERIVED = ("in_features", "hidden_features", "out_features", "act_layer", "drop", "norm_layer", "device", "dtype")
"""Arguments of `MoEMlp` that follow from the model's arguments."""


_MOST_BLOCKS = 10_000  # blocks are modules of Python, even on the meta device: more blocks would fill the memory


def moe_block_indices(depth: int, rule: str | Iterable[int]) -> tuple[int, ...]:
    """Lists the blocks with a MoE layer, of the blocks 0 .. depth - 1, in ascending order.

    Args:
        depth: Number of blocks.
        rule: "last_half" of Soft MoE (arXiv 2308.00951), "every_<n>", "last_<n>", or the indices. "last_half" of an odd
            depth is the larger half. "every_2" of V-MoE (arXiv 2106.05974) means the blocks 1, 3, 5, ...

    Raises:
        ValueError: The rule has another form, selects no block, or names a block twice or out of range.
    """
    depth = Check("moe_block_indices").integer("depth", depth, 1)
    if isinstance(rule, str):
        match = re.fullmatch(r"(last|every)_([1-9]\d*)", rule)
        if rule == "last_half":
            chosen = range(depth // 2, depth)
        elif match is None:
            raise ValueError(
                f'moe_block_indices: moe_blocks is {rule!r}, wanted "last_half", "every_<n>", "last_<n>" or indices'
            )
        elif match[1] == "every":
            chosen = range(int(match[2]) - 1, depth, int(match[2]))
        else:
            chosen = range(depth - int(match[2]), depth)
    else:
        rule = list(rule) if isinstance(rule, Iterable) else rule  # an iterator can be read only once
        if not isinstance(rule, list) or not all(isinstance(i, Integral) and type(i) is not bool for i in rule):
            raise ValueError(f"moe_block_indices: moe_blocks is {rule!r}, wanted a rule's name or a list of int")
        chosen = sorted(map(int, rule))
    if not chosen or chosen[0] < 0 or chosen[-1] >= depth or len(set(chosen)) < len(chosen):
        raise ValueError(
            f"moe_block_indices: moe_blocks {rule!r} names the blocks {list(chosen)},"
            f" wanted at least one of 0 .. {depth - 1}, each once (router=None makes a dense model)"
        )
    return tuple(chosen)


def vit_moe(
    img_size: int | tuple[int, int] = 224,
    patch_size: int | tuple[int, int] = 16,
    in_chans: int = 3,
    num_classes: int = 1000,
    embed_dim: int = 192,
    depth: int = 12,
    num_heads: int = 3,
    mlp_ratio: float = 4.0,
    *,
    router: str | RouterFactory | None = "soft",
    num_experts: int = 32,
    moe_blocks: str | Iterable[int] = "last_half",
    group_size: int = 1,
    global_pool: str = "avg",
    qk_norm: bool = False,
    pre_logits: bool = False,
    pos_embed: str = "learned",
    pos_embed_std: float = 0.02,
    drop_rate: float = 0.0,
    proj_drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    dynamic_img_size: bool = False,
    **router_options: Any,
) -> MoEVisionTransformer:
    """Makes a vision transformer with MoE layers: images [N, in_chans, height, width] -> logits [N, num_classes].

    As in the reference models, GELU has its tanh form and every LayerNorm has eps 1e-6. Dense kernels are drawn Xavier
    uniform (queries, keys and values separately), and the patch kernel LeCun normal. Biases, class token and head
    start at 0.

    The trunk is drawn before the MoE layers: with one `torch.manual_seed`, all routers and the dense model start from
    the same trunk. `model.init_weights()` draws the model again, with the same numbers for the same seed. To draw a
    model that is already sharded, make the model on the meta device, shard it, call `to_empty`, and then
    `init_weights`.

    The model keeps these arguments as `moe_config`, which `vmoe_routers.checkpoints.save_pretrained` writes.

    Args:
        img_size, patch_size: A side in pixels, or height and width.
        in_chans: Channels of an image.
        num_classes: Outputs of the head. 0 means no head.
        embed_dim, depth, num_heads: Width of a token, number of blocks, heads of attention.
        mlp_ratio: Hidden width of MLPs and experts over `embed_dim`.
        router: One of `vmoe_routers.ROUTERS`, or a function ``(dim, num_experts)`` that makes a router, called once
            per MoE layer. None makes the dense ViT with the same trunk.
        num_experts: E, of every MoE layer.
        moe_blocks: The blocks with a MoE layer, as in `moe_block_indices`.
        group_size: Images that are routed together. In training, the batch must be a multiple of this number.
        global_pool: "avg" (mean of the encoder's normalised tokens), "token" (class token), "map" (attention pooling).
        qk_norm: Normalises queries and keys by LayerNorm over the head width (scale, no bias).
        pre_logits: Adds a dense layer of the model's width and tanh between pooling and head, as older ViTs have.
        pos_embed: "learned", drawn from N(0, pos_embed_std^2), or "sincos", fixed, two-dimensional (arXiv 2104.02057).
        pos_embed_std: Standard deviation of learned position embeddings at initialisation.
        drop_rate: Dropout before the head.
        proj_drop_rate: Dropout in MLPs and experts, and after attention.
        drop_path_rate: Stochastic depth, increasing linearly to this rate at the last block.
        dynamic_img_size: Accepts images of any size and resamples the positions in every forward
            (`model.set_input_size` resamples them once).
        router_options: Further options of `MoEMlp` and its router: top_k, capacity_factor, slots_per_expert, ...
            With a capacity factor, Soft MoE needs `num_tokens`. Its default is the tokens of an image, with the class
            token, times `group_size`.

    Raises:
        TypeError, ValueError: Sizes do not fit together, or a name is unknown.
    """
    given = dict(locals())
    options = {name: plain(value) for name, value in given.pop("router_options").items()}
    c = _checked(given, options)
    _check_names(options, given, router)
    moe_at = () if router is None else moe_block_indices(c["depth"], c["moe_blocks"])
    device = torch.get_default_device()
    with torch.device("meta"):  # draws nothing: `init_trunk` draws, here and in `model.init_weights`
        model = _trunk(c)
    model.to_empty(device=device)
    init_trunk(model, c)
    setattr(model, "moe_config", {**c, **options})  # noqa: B010  (timm's class declares none)
    if router is None:
        return model
    if needs_num_tokens(router, options):
        # Keep num_tokens in the config: it fixes the shape of Phi even if the image size changes later.
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        options["num_tokens"] = tokens * c["group_size"]
    setattr(model, "moe_config", {**c, **options})  # noqa: B010
    for i in moe_at:
        block: Any = model.blocks[i]
        block.mlp = MoEMlp(
            c["embed_dim"],
            int(c["embed_dim"] * c["mlp_ratio"]),
            act_layer=GeluTanh,
            drop=c["proj_drop_rate"],
            num_experts=c["num_experts"],
            router=cast(Any, router),
            group_size=c["group_size"],
            **options,
        )
    return model


def _trunk(c: dict[str, Any]) -> MoEVisionTransformer:
    """Makes the dense model, without initial values."""
    width, heads, global_pool = c["embed_dim"], c["num_heads"], c["global_pool"]
    model = MoEVisionTransformer(
        img_size=c["img_size"],
        patch_size=c["patch_size"],
        in_chans=c["in_chans"],
        num_classes=c["num_classes"],
        embed_dim=width,
        depth=c["depth"],
        num_heads=heads,
        mlp_ratio=c["mlp_ratio"],
        global_pool=global_pool,
        class_token=global_pool == "token",
        fc_norm=False,  # normalise before the pooling, also for "avg"
        no_embed_class=c["pos_embed"] == "sincos",  # only a learned table has a row for the class token
        drop_rate=c["drop_rate"],
        proj_drop_rate=c["proj_drop_rate"],
        drop_path_rate=c["drop_path_rate"],
        dynamic_img_size=c["dynamic_img_size"],
        block_fn=MoEBlock,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer=GeluTanh,
        weight_init="skip",
    )
    if c["pre_logits"]:  # timm calls fc_norm between pooling and head
        model.fc_norm = nn.Sequential(OrderedDict(dense=nn.Linear(width, width), act=nn.Tanh()))
    if c["qk_norm"]:
        blocks: Any = model.blocks
        for attention in [block.attn for block in blocks] + ([model.attn_pool] if global_pool == "map" else []):
            attention.q_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
            attention.k_norm = nn.LayerNorm(width // heads, eps=1e-6, bias=False)
    if c["pos_embed"] == "sincos":
        learned: Any = model.pos_embed
        del model.pos_embed
        model.register_buffer("pos_embed", torch.empty_like(learned))
    return model


def needs_num_tokens(router: str | RouterFactory, options: Mapping[str, Any]) -> bool:
    """Tells whether the router needs the tokens of a group, because its capacity factor fixes a shape."""
    takes = "num_tokens" in router_options(router)
    return takes and options.get("capacity_factor") is not None and "num_tokens" not in options


def _check_names(options: Iterable[str], given: Iterable[str], router: str | RouterFactory | None) -> None:
    """Refuses options that no router and no layer has. The router refuses options that only other routers have."""
    if router not in ROUTERS:
        return
    known = {*signature(MoEMlp.__init__).parameters}.union(*map(router_options, ROUTERS))
    for name in options:
        if name not in known:
            meant = did_you_mean(name, [*given, *sorted(known)])
            raise TypeError(f"vit_moe: no argument and no option of a router is named {name!r}{meant}")


def _checked(config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Checks the arguments of `vit_moe` and converts them to plain values of Python, which a config can keep."""
    check = Check("vit_moe")
    c = dict(config)
    image, patch = (_pair(name, c[name]) for name in ("img_size", "patch_size"))
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(f"vit_moe: img_size {c['img_size']} is not a multiple of patch_size {c['patch_size']}")
    for name, size in (("img_size", image), ("patch_size", patch)):
        c[name] = size[0] if size[0] == size[1] else size
    c["depth"] = check.integer("depth", c["depth"], 1, _MOST_BLOCKS)
    lowest = {"in_chans": 1, "num_classes": 0, "embed_dim": 1, "num_heads": 1, "group_size": 1}
    for name, low in {**lowest, "num_experts": 1}.items():
        c[name] = check.integer(name, c[name], low)
    if c["embed_dim"] % c["num_heads"]:
        raise ValueError(f"vit_moe: embed_dim {c['embed_dim']} is not a multiple of num_heads {c['num_heads']}")
    c["mlp_ratio"] = check.number("mlp_ratio", c["mlp_ratio"])
    if c["embed_dim"] * c["mlp_ratio"] < 1:
        raise ValueError(f"vit_moe: mlp_ratio is {c['mlp_ratio']}, wanted a hidden width of at least 1")
    check.choice("global_pool", c["global_pool"], POOLINGS)
    check.choice("pos_embed", c["pos_embed"], POSITIONS)
    if c["pos_embed"] == "sincos" and (c["embed_dim"] % 4 or c["embed_dim"] < 8):
        raise ValueError(
            f'vit_moe: embed_dim is {c["embed_dim"]}, wanted a multiple of 4, at least 8, for pos_embed "sincos"'
        )
    for name in ("qk_norm", "pre_logits", "dynamic_img_size"):
        check.flag(name, c[name])
    for name in ("pos_embed_std", "drop_rate", "proj_drop_rate", "drop_path_rate"):
        c[name] = check.number(name, c[name], zero=True)
        if name != "pos_embed_std" and c[name] >= 1:
            raise ValueError(f"vit_moe: {name} is {c[name]}, wanted a rate in [0, 1)")
    router = c["router"]
    if router is not None:
        check_router(check, router)
    if router is None and options:
        raise ValueError(f"vit_moe: router is None (a dense model), but came with {sorted(options)}")
    for name in _DERIVED:
        if name in options:
            raise TypeError(f"vit_moe: {name!r} is not an option: it follows from the model's other arguments")
    if options.get("experts") is not None:
        raise TypeError("vit_moe: experts is not an option: the blocks would share them; replace model.blocks[i].mlp")
    if router is not None:
        c["moe_blocks"] = _plain_blocks(c["depth"], c["moe_blocks"])
    return c


def check_router(check: Check, router: object) -> None:
    """Checks that `router` can make a separate router for every MoE layer."""
    if isinstance(router, nn.Module):
        raise TypeError(
            f"{check.where}: router must be a name, or a function (dim, num_experts) that makes a router for every MoE"
            f" layer, got one {type(router).__name__}"
        )
    if not callable(router):
        check.choice("router", router, ROUTERS)


def plain(value: Any) -> Any:
    """Converts a number of numpy to a number of Python."""
    return value.item() if isinstance(value, Number) and hasattr(value, "item") else value  # type: ignore[attr-defined]


def _plain_blocks(depth: int, rule: str | Iterable[int]) -> str | list[int]:
    """Checks the rule. Returns a name unchanged, and indices as a list."""
    if isinstance(rule, str):
        moe_block_indices(depth, rule)
        return rule
    return list(moe_block_indices(depth, rule))


def _pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, Integral) else tuple(size) if isinstance(size, Sequence) else ()
    whole = all(isinstance(side, Integral) and not isinstance(side, bool) and int(side) > 0 for side in pair)
    if len(pair) != 2 or not whole:
        raise ValueError(f"vit_moe: {name} is {size!r}, wanted a positive int or a pair of them")
    return int(pair[0]), int(pair[1])
