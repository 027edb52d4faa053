"""timm's VisionTransformer with a padding mask for attention, MoE layers and pooling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer, global_pool_nlc
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vmoe_routers.models.init import init_trunk
from vmoe_routers.moe import MoEMlp, no_weight_decay

_MASKED = -3e4
"""Score of a masked token: exp(-3e4) is 0, and -3e4 is finite in every dtype, so a fully masked row has no NaN."""


class MoEVisionTransformer(VisionTransformer):
    """timm's VisionTransformer whose methods take a padding mask. `vit_moe` makes it.

    The argument `mask` of `forward`, `forward_features`, `forward_intermediates`, `get_intermediate_layers`, `pool` and
    `forward_head` is [N, patches] bool, True = real patch, in row-major order. Masked patches are ignored by attention,
    routing and pooling, even if they contain NaN or inf. Their own features are finite and have no meaning.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Maps images [N, channels, height, width] to logits [N, num_classes].

        Args:
            x: The images.
            attn_mask: timm's mask for attention, only without `mask`. MoE layers ignore tokens that it hides from every
                query.
            mask: [N, patches] bool, True = real patch.
        """
        return self.forward_head(self.forward_features(x, attn_mask, mask=mask), mask=mask)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Maps images to the encoder's tokens [N, T, D]. Takes the arguments of `forward`."""
        if mask is None:
            return super().forward_features(x, attn_mask)
        x, attn_mask = self._hide(x, attn_mask, mask)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, attn_mask, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, attn_mask)
        return self.norm(x)

    def forward_intermediates(
        self, x: Tensor, *args: Any, attn_mask: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Computes the features of the blocks. `args` and `kwargs` are timm's."""
        x, attn_mask = self._hide(x, attn_mask, mask)
        return super().forward_intermediates(x, *args, attn_mask=attn_mask, **kwargs)

    def get_intermediate_layers(
        self, x: Tensor, *args: Any, attn_mask: Tensor | None = None, mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Computes the features of blocks as DINO's code does. `args` and `kwargs` are timm's."""
        x, attn_mask = self._hide(x, attn_mask, mask)
        return super().get_intermediate_layers(x, *args, attn_mask=attn_mask, **kwargs)

    def pool(self, x: Tensor, pool_type: str | None = None, *, mask: Tensor | None = None) -> Tensor:
        """Pools tokens [N, T, D] to [N, D]. `pool_type` is timm's."""
        if mask is None:
            return super().pool(x, pool_type)
        if self.attn_pool is None:
            pool_type = self.global_pool if pool_type is None else pool_type
            return pool_real(x, mask, pool_type, self.num_prefix_tokens, self.pool_include_prefix)
        if self.pool_include_prefix:
            return self.attn_pool(x, attn_mask=attention_mask(x, None, mask, self.num_prefix_tokens))
        return self.attn_pool(x[:, self.num_prefix_tokens :], attn_mask=attention_mask(x, None, mask, 0))

    def forward_head(self, x: Tensor, pre_logits: bool = False, *, mask: Tensor | None = None) -> Tensor:
        """Maps the encoder's tokens to logits, or, with `pre_logits`, to the inputs of the last layer."""
        x = self.head_drop(self.fc_norm(self.pool(x, mask=mask)))
        return x if pre_logits else self.head(x)

    def init_weights(self, mode: str = "", **kwargs: Any) -> None:
        """Draws the model again as `vit_moe` does, for example after the meta device and `to_empty`.

        `reset_parameters` of the trunk's modules draws as torch does. A later call of this method undoes that.

        Args:
            mode, kwargs: timm's, for a model that `vit_moe` did not make.

        Raises:
            ValueError: `mode` names a scheme, but the model has the scheme of `vit_moe`.
            TypeError: A router or an expert has parameters, but no `reset_parameters`.
        """
        config = getattr(self, "moe_config", None)
        if config is None:
            super().init_weights(mode, **kwargs)
            return
        if mode not in ("", "reset"):
            raise ValueError(f'MoEVisionTransformer: mode must be "" for a model of vit_moe, got {mode!r}')
        init_trunk(self, config)
        for block in self.blocks:
            mlp = block.get_submodule("mlp")
            if isinstance(mlp, MoEMlp):
                mlp.reset_parameters()

    def no_weight_decay(self) -> set[str]:
        """Names the parameters that optimizers should not decay, as timm's factory asks for them."""
        return super().no_weight_decay() | no_weight_decay(self)

    def _hide(self, x: Tensor, attn_mask: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Removes the masked patches from the images, and makes the attention mask."""
        grid = self.patch_embed.dynamic_feat_size(x.shape[2:])
        x = hide_patches(x, mask, grid, self.patch_embed.patch_size)
        return x, attention_mask(x, attn_mask, mask, self.num_prefix_tokens)


def hide_patches(x: Tensor, mask: Tensor | None, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """Sets the pixels of masked patches to 0: their attention weight is 0, and 0 times NaN or inf is NaN."""
    if mask is None:
        return x
    _check(mask, x, grid[0] * grid[1])
    hidden = ~mask.view(-1, 1, grid[0], 1, grid[1], 1)
    hidden = hidden.expand(-1, 1, grid[0], patch[0], grid[1], patch[1])
    hidden = hidden.reshape(-1, 1, grid[0] * patch[0], grid[1] * patch[1])
    return x.masked_fill(hidden[..., : x.shape[2], : x.shape[3]], 0)


def attention_mask(x: Tensor, attn_mask: Tensor | None, mask: Tensor | None, prefix: int) -> Tensor | None:
    """Makes the term added to the scores [N, heads, queries, T], in the dtype of x.

    The first `prefix` tokens are never masked.
    """
    if mask is None:
        return attn_mask
    if attn_mask is not None:
        raise TypeError("MoEVisionTransformer: mask cannot be combined with attn_mask")
    mask = F.pad(mask, (prefix, 0), value=True)
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, _MASKED)[:, None, None]


def pool_real(x: Tensor, mask: Tensor | None, pool_type: str, prefix: int, include_prefix: bool) -> Tensor:
    """Pools like timm's `global_pool_nlc`, without masked patches."""
    if mask is None or pool_type in ("", "token"):
        return global_pool_nlc(x, pool_type, prefix, include_prefix)
    _check(mask, x, x.shape[1] - prefix)
    x = x if include_prefix else x[:, prefix:]
    real = F.pad(mask, (prefix if include_prefix else 0, 0), value=True).unsqueeze(2)
    mean = x.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)
    if pool_type == "avg":
        return mean
    largest = x.masked_fill(~real, torch.finfo(x.dtype).min).amax(1).masked_fill(~real.any(1), 0)
    return largest if pool_type == "max" else (largest + mean) / 2


def _check(mask: Tensor, x: Tensor, patches: int) -> None:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"MoEVisionTransformer: mask must be bool, True = real patch, got {kind}")
    if mask.shape != (x.shape[0], patches):
        raise ValueError(
            f"MoEVisionTransformer: mask must be [N, patches] = {[x.shape[0], patches]}, got {list(mask.shape)}"
        )


# Symbolic tracing keeps these functions as one node each, with and without a mask.
torch.fx.wrap("hide_patches")
torch.fx.wrap("attention_mask")
torch.fx.wrap("pool_real")
