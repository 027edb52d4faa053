"""ViT-MoE: timm's VisionTransformer with MoE layers in place of the MLPs of some blocks.

Nothing of timm is changed: the model is a `timm.models.VisionTransformer` whose `blocks[i].mlp` is a `MoEMlp`
where the placement rule says so, so everything that works on the one (feature extraction, checkpointing,
optimisers' parameter groups) works on the other. Only its forward takes a padding mask beside (`MoEVisionTransformer`).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from vmoe_routers.models.transformer import MoEBlock, MoEVisionTransformer
from vmoe_routers.moe import GeluTanh, MoEMlp
from vmoe_routers.ops._checks import check_choice, check_flag, check_int, check_positive
from vmoe_routers.routers import ROUTERS

#: Ti, S, B, L, H (arXiv 2010.11929, table 1): `vit_moe(**SIZES["S"], patch_size=16)`.
SIZES: dict[str, dict[str, int]] = {
    "Ti": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "S": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "B": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "L": {"embed_dim": 1024, "depth": 24, "num_heads": 16},
    "H": {"embed_dim": 1280, "depth": 32, "num_heads": 16},
}

POOLINGS = ("avg", "token", "map")
POSITIONS = ("learned", "sincos")

# arguments of MoEMlp that follow from the model's own
_DERIVED = ("in_features", "hidden_features", "out_features", "act_layer", "drop", "norm_layer", "device", "dtype")


def moe_block_indices(depth: int, rule: str | Sequence[int]) -> tuple[int, ...]:
    """The blocks, of 0 .. depth - 1, that hold a MoE layer.

    rule: "last_half" (Soft MoE, arXiv 2308.00951; the larger half of an odd depth), "every_2" (blocks 1, 3, 5, ...;
    V-MoE, arXiv 2106.05974) or any "every_<n>", "last_<n>", or the indices themselves. Ascending. At least one.

    Raises ValueError for a rule that is none of these, or that names no block or one that is not there.
    """
    check_int("moe_block_indices", "depth", depth, 1)
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
        if not isinstance(rule, Sequence) or not all(type(i) is int for i in rule):
            raise ValueError(f"moe_block_indices: moe_blocks is {rule!r}, wanted a rule's name or a list of int")
        chosen = sorted(rule)
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
    router: str | None = "soft",
    num_experts: int = 32,
    moe_blocks: str | Sequence[int] = "last_half",
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
    """A vision transformer with MoE layers: images [N, in_chans, height, width] -> logits [N, num_classes].

    router          one of `vmoe_routers.ROUTERS`; None makes the dense ViT of the same trunk
    num_experts     E, of every MoE layer
    moe_blocks      where the MoE layers are: see `moe_block_indices`
    group_size      images that are routed together; the batch must be a multiple of it in training
    global_pool     "avg": mean of the encoder's normalised tokens; "token": class token; "map": attention pooling
    qk_norm         LayerNorm over the head width (scale, no bias) on queries and keys
    pre_logits      a dense layer of the model's width and tanh between pooling and head, which older ViTs have
    pos_embed       "learned": drawn from N(0, pos_embed_std^2); "sincos": fixed, two-dimensional (arXiv 2104.02057)
    drop_rate       dropout before the head
    proj_drop_rate  dropout in the MLPs and experts and after attention
    drop_path_rate  stochastic depth, growing linearly to this rate at the last block
    dynamic_img_size  images of any size, positions resampled on the way (`model.set_input_size` does it once)
    router_options  every further option of `MoEMlp` and its router: top_k, capacity_factor, slots_per_expert, ...
                    Soft with a capacity factor needs num_tokens: it is worked out here (tokens of an image, the class
                    token among them, times group_size)

    As in the reference models, GELU is the tanh form, every LayerNorm has eps 1e-6, dense kernels are Xavier uniform
    (queries, keys and values each by itself), the patch kernel LeCun normal, biases, class token and head 0.

    The trunk is drawn before the MoE layers, so the same `torch.manual_seed` gives the same trunk for every router
    (and for the dense model): compare routers on equal starting points.

    The model keeps these arguments as `moe_config`, which `vmoe_routers.checkpoints.save_pretrained` writes.

    Raises TypeError or ValueError naming the argument: sizes that do not fit together, names that do not exist.
    """
    config = dict(locals())
    config |= config.pop("router_options")
    where = "vit_moe"
    image, patch = _pair("img_size", img_size), _pair("patch_size", patch_size)
    if image[0] % patch[0] or image[1] % patch[1]:
        raise ValueError(f"{where}: img_size {img_size} is not a multiple of patch_size {patch_size}")
    check_int(where, "in_chans", in_chans, 1)
    check_int(where, "num_classes", num_classes, 0)
    check_int(where, "embed_dim", embed_dim, 1)
    check_int(where, "depth", depth, 1)
    check_int(where, "num_heads", num_heads, 1)
    if embed_dim % num_heads:
        raise ValueError(f"{where}: embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
    if embed_dim * check_positive(where, "mlp_ratio", mlp_ratio) < 1:
        raise ValueError(f"{where}: mlp_ratio is {mlp_ratio}, wanted a hidden width of at least 1")
    check_int(where, "group_size", group_size, 1)
    check_choice(where, "global_pool", global_pool, POOLINGS)
    check_flag(where, "qk_norm", qk_norm)
    check_flag(where, "pre_logits", pre_logits)
    check_flag(where, "dynamic_img_size", dynamic_img_size)
    check_choice(where, "pos_embed", pos_embed, POSITIONS)
    check_positive(where, "pos_embed_std", pos_embed_std, zero=True)
    rates = {"drop_rate": drop_rate, "proj_drop_rate": proj_drop_rate, "drop_path_rate": drop_path_rate}
    for name, rate in rates.items():
        if check_positive(where, name, rate, zero=True) >= 1:
            raise ValueError(f"{where}: {name} is {rate}, wanted a rate in [0, 1)")
    check_choice(where, "router", router, (*ROUTERS, None))
    if router is None and router_options:
        raise ValueError(f"{where}: router is None (a dense model), but came with {sorted(router_options)}")
    for name in _DERIVED:
        if name in router_options:
            raise TypeError(f"{where}: {name!r} is no option, it follows from the model's other arguments")
    moe_at = () if router is None else moe_block_indices(depth, moe_blocks)

    model = MoEVisionTransformer(
        img_size=image,
        patch_size=patch,
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        global_pool=cast(Any, global_pool),  # timm has a Literal
        class_token=global_pool == "token",
        fc_norm=False,  # the encoder's norm comes before the pooling, also for "avg"
        no_embed_class=pos_embed == "sincos",  # a learned table has a row for the class token, a fixed one has not
        drop_rate=drop_rate,
        proj_drop_rate=proj_drop_rate,
        drop_path_rate=drop_path_rate,
        dynamic_img_size=dynamic_img_size,
        block_fn=MoEBlock,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        act_layer=GeluTanh,
        weight_init="skip",
    )
    setattr(model, "moe_config", config)  # noqa: B010  (timm's class declares none)
    blocks: Any = model.blocks
    if pre_logits:  # timm's place for what comes between pooling and head
        model.fc_norm = nn.Sequential(OrderedDict(dense=nn.Linear(embed_dim, embed_dim), act=nn.Tanh()))
    if qk_norm:
        for attention in [block.attn for block in blocks] + ([model.attn_pool] if global_pool == "map" else []):
            attention.q_norm = nn.LayerNorm(embed_dim // num_heads, eps=1e-6, bias=False)
            attention.k_norm = nn.LayerNorm(embed_dim // num_heads, eps=1e-6, bias=False)
    if pos_embed == "sincos":
        grid = image[0] // patch[0], image[1] // patch[1]
        del model.pos_embed
        model.register_buffer("pos_embed", _sincos_positions(*grid, embed_dim))
    _init_trunk(model, pos_embed_std)

    if router is None:
        return model
    if router == "soft" and router_options.get("capacity_factor") is not None:
        tokens = model.patch_embed.num_patches + model.num_prefix_tokens
        # Kept, so that images of another size do not make other slots of the model when it is made again
        config["num_tokens"] = router_options.setdefault("num_tokens", tokens * group_size)
    for i in moe_at:
        blocks[i].mlp = MoEMlp(
            embed_dim,
            int(embed_dim * mlp_ratio),
            act_layer=GeluTanh,
            drop=proj_drop_rate,
            num_experts=num_experts,
            router=router,
            group_size=group_size,
            **router_options,
        )
    return model


def _pair(name: str, size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, Sequence) else ()
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise ValueError(f"vit_moe: {name} is {size!r}, wanted a positive int or a pair of them")
    return pair


def _sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """[1, height * width, dim]: sin x, cos x, sin y, cos y, a quarter of the width each (arXiv 2104.02057)."""
    if dim % 4 or dim < 8:
        raise ValueError(f'vit_moe: embed_dim is {dim}, wanted a multiple of 4, at least 8, for pos_embed "sincos"')
    frequency = 10_000.0 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    y, x = (torch.arange(n, dtype=torch.float64)[:, None] * frequency for n in (height, width))
    y = y[:, None].expand(-1, width, -1)
    x = x[None, :].expand(height, -1, -1)
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)
    return table.reshape(1, height * width, dim).to(torch.get_default_dtype())


@torch.no_grad()
def _init_trunk(model: Any, pos_embed_std: float) -> None:
    """Draw every parameter but LayerNorm's as the reference models do (its own defaults, 1 and 0, are right)."""
    fused = {"qkv": 3, "kv": 2}  # kernels stored as one, drawn as several
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            for kernel in module.weight.chunk(fused.get(name.rpartition(".")[2], 1)):
                nn.init.xavier_uniform_(kernel)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    patch = model.patch_embed.proj
    std = patch.weight[0].numel() ** -0.5 / 0.87962566103423978  # of the normal that, cut at two std, has the first
    nn.init.trunc_normal_(patch.weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(patch.bias)
    if isinstance(model.pos_embed, nn.Parameter):
        nn.init.normal_(model.pos_embed, std=pos_embed_std)
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    if model.attn_pool is not None:
        nn.init.xavier_uniform_(model.attn_pool.latent[0])
    if isinstance(model.head, nn.Linear):
        nn.init.zeros_(model.head.weight)
