"""Transformer blocks of timm whose MoE layers ignore the tokens that an attention mask hides."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock
from torch import Tensor, nn

from vmoe_routers.moe import MoEMlp

_HIDDEN = -1e4
"""Highest score that hides a token: exp(-1e4) is 0 in every dtype."""


class MoEBlock(Block):
    """timm's block. Its MoE layer ignores the tokens that `attn_mask` hides from every query."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps tokens x [N, T, D] to the same shape. The arguments are timm's."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, **kwargs)))
        return x + self.drop_path2(self.ls2(_masked(self.mlp, self.norm2(x), attn_mask)))


class MoEResPostBlock(ResPostBlock):
    """timm's block with norms after attention and MLP, masked like `MoEBlock`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps tokens x [N, T, D] to the same shape. The arguments are timm's."""
        x = x + self.drop_path1(self.norm1(self.attn(x, attn_mask=attn_mask, **kwargs)))
        return x + self.drop_path2(self.norm2(_masked(self.mlp, x, attn_mask)))


class MoEEvaBlock(EvaBlock):
    """EVA's block of timm, masked like `MoEBlock`."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps tokens x [N, T, D] to the same shape. The arguments are timm's."""
        attended = self.attn(self.norm1(x), rope=rope, attn_mask=attn_mask, **kwargs)
        x = x + self.drop_path1(attended if self.gamma_1 is None else self.gamma_1 * attended)
        hidden = _masked(self.mlp, self.norm2(x), attn_mask)
        return x + self.drop_path2(hidden if self.gamma_2 is None else self.gamma_2 * hidden)


class MoEEvaBlockPostNorm(EvaBlockPostNorm):
    """EVA's block of timm with norms after attention and MLP, masked like `MoEBlock`."""

    def forward(self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps tokens x [N, T, D] to the same shape. The arguments are timm's."""
        x = x + self.drop_path1(self.norm1(self.attn(x, rope=rope, attn_mask=attn_mask, **kwargs)))
        return x + self.drop_path2(self.norm2(_masked(self.mlp, x, attn_mask)))


_MASKED: dict[type[nn.Module], type[nn.Module]] = {
    Block: MoEBlock,
    ResPostBlock: MoEResPostBlock,
    EvaBlock: MoEEvaBlock,
    EvaBlockPostNorm: MoEEvaBlockPostNorm,
}


def pass_masks(block: nn.Module) -> None:
    """Makes a block pass the padding of its `attn_mask` to its MoE layer, or refuse `attn_mask`."""
    kind = type(block)
    if kind in _MASKED:
        block.__class__ = _MASKED[kind]
    elif kind not in _MASKED.values():
        parameters = list(inspect.signature(block.forward).parameters)
        if "attn_mask" in parameters:
            refuse = partial(_refuse_mask, position=parameters.index("attn_mask"))
            block.register_forward_pre_hook(refuse, with_kwargs=True)


def _refuse_mask(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], position: int) -> None:
    mask = args[position] if position < len(args) else kwargs.get("attn_mask")
    if mask is not None:
        raise TypeError(
            f"upcycle: attn_mask came to a {type(block).__name__}, which does not pass it to its MoE layer; wanted no"
            " mask, or a block of timm's VisionTransformer, Eva or NaFlexVit"
        )


def _masked(mlp: nn.Module, x: Tensor, attn_mask: Tensor | None) -> Tensor:
    if attn_mask is None or not isinstance(mlp, MoEMlp):
        return mlp(x)
    return mlp(x, real_tokens(attn_mask, x))


def real_tokens(attn_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """Finds the tokens of x [N, T, D] that at least one query may attend to.

    Args:
        attn_mask: Bool, True = may attend, or added to the scores. Broadcast to [N, heads, queries, T]. None: no mask.
        x: The tokens.

    Returns:
        [N, T] bool, or None without a mask.
    """
    if attn_mask is None:
        return None
    seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask > _HIDDEN
    return seen[(None,) * (4 - seen.ndim)].any(2).any(1).expand(x.shape[:2])


torch.fx.wrap("real_tokens")  # symbolic tracing keeps the function as one node, with and without a mask
