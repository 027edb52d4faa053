"""Vision transformers with mixture-of-experts layers, based on timm's VisionTransformer (`pip install timm`)."""

from vmoe_routers.models.cost import cost
from vmoe_routers.models.transformer import MoEVisionTransformer
from vmoe_routers.models.upcycle import upcycle
from vmoe_routers.models.vit import SIZES, moe_block_indices, vit_moe
from vmoe_routers.models.zoo import NAMES

__all__ = ["NAMES", "SIZES", "MoEVisionTransformer", "cost", "moe_block_indices", "upcycle", "vit_moe"]
