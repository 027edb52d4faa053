"""Initialises the models of `vit_moe`, also models made on the meta device and models with sharded parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.moe import MoEMlp

_FUSED = {"qkv": 3, "kv": 2}
"""Number of kernels in a layer that stores several kernels as one. Each kernel has its own bound."""


@torch.no_grad()
def init_trunk(model: Any, config: Mapping[str, Any]) -> None:
    """Sets all parameters and positions outside the MoE layers as the reference models do.

    Every value is set in place by one operation on the whole parameter, which a sharded parameter supports. The trunk
    draws the same numbers for every choice of blocks with MoE layers.

    Args:
        model: A `MoEVisionTransformer`.
        config: Arguments of `vit_moe`.
    """
    patch = model.patch_embed.proj.weight
    for name, module in _outside_moe(model):
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            _xavier(module.weight, inputs + outputs // _FUSED.get(name, 1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, MoEMlp):  # draw the kernels of the MLP that the layer replaces
            size = config["embed_dim"] * int(config["embed_dim"] * config["mlp_ratio"])
            for _ in range(2):
                nn.init.uniform_(torch.empty(size, dtype=patch.dtype, device=patch.device))
    # Truncating a normal distribution at two standard deviations multiplies its standard deviation by 0.8796.
    std = patch[0].numel() ** -0.5 / 0.87962566103423978
    nn.init.trunc_normal_(patch, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(model.patch_embed.proj.bias)
    if config["pos_embed"] == "sincos":
        height, width = model.patch_embed.grid_size
        model.pos_embed.copy_(sincos_positions(height, width, config["embed_dim"]))
    else:
        nn.init.normal_(model.pos_embed, std=config["pos_embed_std"])
    if model.cls_token is not None:
        nn.init.zeros_(model.cls_token)
    if model.attn_pool is not None:
        _xavier(model.attn_pool.latent, sum(model.attn_pool.latent.shape[1:]))
    if isinstance(model.head, nn.Linear):
        nn.init.zeros_(model.head.weight)


def sincos_positions(height: int, width: int, dim: int) -> Tensor:
    """Computes the table [1, height * width, dim]: sin x, cos x, sin y, cos y, a quarter of the width each."""
    frequency = 10_000.0 ** -torch.linspace(0, 1, dim // 4, dtype=torch.float64)
    y, x = (torch.arange(n, dtype=torch.float64)[:, None] * frequency for n in (height, width))
    y = y[:, None].expand(-1, width, -1)
    x = x[None, :].expand(height, -1, -1)
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1)
    return table.reshape(1, height * width, dim).to(torch.get_default_dtype())


def _xavier(weight: Tensor, inputs_and_outputs: int) -> None:
    """Draws Xavier uniform values, in one call for all kernels of a layer."""
    bound = math.sqrt(6 / inputs_and_outputs)
    nn.init.uniform_(weight, -bound, bound)


def _outside_moe(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Lists a module and its parts with their last names, in the order of `modules()`, without parts of MoE layers."""
    yield name, module
    if not isinstance(module, MoEMlp):
        for child_name, child in module.named_children():
            yield from _outside_moe(child, child_name)
