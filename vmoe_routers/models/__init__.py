"""Vision transformers with mixture-of-experts layers, based on timm's VisionTransformer (`pip install timm`)."""

import torch

try:
    import timm.models.vision_transformer  # noqa: F401
except ImportError as _error:
    raise ImportError(f"vmoe_routers.models needs timm ({_error}): pip install timm") from _error
except (RuntimeError, AttributeError) as _error:  # raised by a torchvision built for another torch
    raise ImportError(
        f"vmoe_routers.models: timm could not be imported: torchvision was built for another torch than"
        f" {torch.__version__} ({_error}). Install the torchvision of that release from the index that torch came from:"
        " pip install --force-reinstall --no-deps torchvision --index-url https://download.pytorch.org/whl/<cpu|cu...>"
    ) from _error

# isort: split
from vmoe_routers.models.cost import cost
from vmoe_routers.models.transformer import MoEVisionTransformer
from vmoe_routers.models.upcycle import upcycle
from vmoe_routers.models.vit import SIZES, moe_block_indices, vit_moe
from vmoe_routers.models.zoo import NAMES

__all__ = ["NAMES", "SIZES", "MoEVisionTransformer", "cost", "moe_block_indices", "upcycle", "vit_moe"]
