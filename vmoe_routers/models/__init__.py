"""Vision transformers with mixture-of-experts layers, on timm's VisionTransformer (`pip install timm`)."""

from vmoe_routers.models.vit import SIZES, moe_block_indices, vit_moe

__all__ = ["SIZES", "moe_block_indices", "vit_moe"]
