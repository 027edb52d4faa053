"""timm's VisionTransformer with a padding mask for attention, MoE layers and pooling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vmoe_routers.moe import MoEMlp
from vmoe_routers.ops._dtypes import fill_masked

try:
    from timm.models.vision_transformer import Block, VisionTransformer
except ImportError as error:
    raise ImportError(f"vmoe_routers.models needs timm ({error}): pip install timm") from error
except (RuntimeError, AttributeError) as error:  # raised by a torchvision built for another torch
    raise ImportError(
        f"vmoe_routers.models: timm could not be imported: torchvision was built for another torch than"
        f" {torch.__version__} ({error}). Install the torchvision of that release from the index that torch came from:"
        " pip install --force-reinstall --no-deps torchvision --index-url https://download.pytorch.org/whl/<cpu|cu...>"
    ) from error

_MASKED = -3e4
"""Score of a masked token: exp(-3e4) is 0, and -3e4 is finite in every dtype, so a fully masked row has no NaN."""


class MoEBlock(Block):
    """timm's block; attention and routing ignore the tokens that `mask` [N, T] (True = real token) masks."""

    def forward(self, x: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps tokens x [N, T, D] to the same shape; further arguments are timm's."""
        if mask is None:
            return super().forward(x, *args, **kwargs)
        attended = self.attn(self.norm1(x), attn_mask=_attention_mask(mask, x.dtype))
        x = x + self.drop_path1(self.ls1(attended))
        hidden = self.norm2(x)
        hidden = self.mlp(hidden, mask) if isinstance(self.mlp, MoEMlp) else self.mlp(hidden)
        return x + self.drop_path2(self.ls2(hidden))


class MoEVisionTransformer(VisionTransformer):
    """timm's VisionTransformer whose forward takes a padding mask; `vit_moe` makes it."""

    def forward(self, x: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps images [N, channels, height, width] to logits [N, num_classes].

        Args:
            x: The images.
            mask: [N, patches] bool, True = real patch, in row-major order. Masked patches are ignored by attention,
                routing and pooling, even if they contain NaN or inf.
            args, kwargs: timm's further arguments, only without a mask.
        """
        if mask is None:
            return super().forward(x, *args, **kwargs)
        x = self.forward_features(x, *args, mask=mask, **kwargs)
        return self._masked_head(x, self._of_tokens(mask))

    def forward_features(self, x: Tensor, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Maps images to the encoder's tokens [N, T, D]; takes the arguments of `forward`."""
        if mask is None:
            return super().forward_features(x, *args, **kwargs)
        if args or kwargs:
            raise TypeError("MoEVisionTransformer: mask cannot be combined with other arguments")
        x = self._pos_embed(self.patch_embed(x))
        patches = x.shape[1] - self.num_prefix_tokens
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(f"MoEVisionTransformer: mask must be bool, True = real patch, got {kind}")
        if mask.shape != (x.shape[0], patches):
            raise ValueError(
                f"MoEVisionTransformer: mask must be [N, patches] = {[x.shape[0], patches]}, got {list(mask.shape)}"
            )
        mask = self._of_tokens(mask)
        # Masked tokens have the attention weight 0, and 0 times NaN or inf is NaN.
        x = fill_masked(x, mask, 0.0)
        x = self.norm_pre(self.patch_drop(x))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask=mask, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = block(x, mask=mask)
        return self.norm(x)

    def _of_tokens(self, mask: Tensor) -> Tensor:
        """Extends the mask of the patches by the tokens before them."""
        return torch.nn.functional.pad(mask, (self.num_prefix_tokens, 0), value=True)

    def _masked_head(self, x: Tensor, mask: Tensor) -> Tensor:
        """Runs `forward_head` without the masked tokens in the pooling."""
        if self.attn_pool is not None:
            x = self.attn_pool(x, attn_mask=_attention_mask(mask, x.dtype))
        elif self.global_pool == "avg":
            real = mask[:, self.num_prefix_tokens :, None]
            total = x[:, self.num_prefix_tokens :].masked_fill(~real, 0).sum(1)
            x = total / real.sum(1).clamp(min=1)
        else:
            x = x[:, 0]
        return self.head(self.head_drop(self.fc_norm(x)))


def _attention_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Makes the term added to the scores [N, heads, queries, T]."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, _MASKED)[:, None, None]
