"""Settings of a study: data, models, recipe and routers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from vmoe_routers.options import MAX_CAPACITY_FACTOR, OptionError
from vmoe_routers.routers import ROUTERS
from vmoe_routers.study.own import is_own
from vmoe_routers.training.optimisation import Optimisation

_MAX = (1 << 31) - 1
_LIMITS = {
    "seeds": 10_000,
    "epochs": 1_000_000,
    **dict.fromkeys(("batch_size", "image_size", "max_images", "patch_size", "width", "depth", "heads"), _MAX),
    **dict.fromkeys(("num_experts", "group_size"), _MAX),
}


@dataclass(frozen=True)
class Settings:
    """Settings of a study. Each is an option of ``vmoe-routers study``.

    Args:
        data: "digits", "torchvision:NAME", "hf:NAME", or a folder with IDX files (MNIST), train/ and val/, or shards.
        transfer_data: a second data set, for 10-shot transfer and its figure.
        output: the folder for runs, table, figures and report. Runs with a record in this folder are not run again.
        routers: names of routers, or package.module:factory for an own router; a dense ViT always runs too.
        top_k: experts per token for Token Choice, a list to compare.
        capacity_factors: slots per routed token, a list to compare.
        plan_combine: whether Sinkhorn Token Choice also runs with the plan's values as gates.
        seeds: number of seeds. Every seed has its own initialisation, data order and noise.
        epochs: passes over the data.
        batch_size: a multiple of group_size.
        learning_rate: peak learning rate of AdamW.
        image_size: resize images to this height and width. Default: their own size, or 32 for images in files.
        max_images: use at most this many training images and this many test images.
        shift: largest random shift of a training image, in pixels.
        patch_size: height and width of a patch, in pixels.
        width: width of a token.
        mlp_ratio: hidden width of an MLP or expert, in token widths. 1 makes the study shorter than the usual 4.
        depth: number of blocks. The last half of them has MoE layers.
        heads: number of attention heads.
        num_experts: experts of every MoE layer.
        group_size: images that are routed together. Soft MoE always routes one image.
        scale_init: initial value of Soft MoE's scale.
        device: "cpu", "cuda" or "cuda:N".
        workers: runs at the same time. 0 means one per CPU core that has enough memory, or one run on CUDA.
    """

    data: str = "digits"
    transfer_data: str | None = None
    output: Path = Path("study")
    routers: list[str] = field(default_factory=lambda: list(ROUTERS))
    top_k: list[int] = field(default_factory=lambda: [1, 2])
    capacity_factors: list[float] = field(default_factory=lambda: [1.0])
    plan_combine: bool = True
    seeds: int = 3
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 2e-3
    image_size: int | None = None
    max_images: int | None = None
    shift: int = 1
    patch_size: int = 2
    width: int = 64
    mlp_ratio: float = 1.0
    depth: int = 4
    heads: int = 4
    num_experts: int = 8
    group_size: int = 8
    scale_init: float = 16.0
    device: str = "cpu"
    workers: int = 0

    def __post_init__(self):
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise OptionError(f"{name} must be at least 1 and at most {most}, got {value}", name)
        for name in ("shift", "workers"):
            if not 0 <= getattr(self, name) <= _MAX:
                raise OptionError(f"{name} must be at least 0 and at most {_MAX}, got {getattr(self, name)}", name)
        if not math.isfinite(self.scale_init):
            raise OptionError(f"scale_init must be finite, got {self.scale_init}", "scale_init")
        for name in ("learning_rate", "mlp_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be positive and finite, got {getattr(self, name)}", name)
        for name in ("data", "transfer_data", "routers", "top_k", "capacity_factors"):
            if getattr(self, name) in ("", []):
                raise OptionError(f"{name} must not be empty", name)
        if self.batch_size % self.group_size:
            raise OptionError(
                f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}",
                "batch_size",
                "group_size",
            )
        if self.width % self.heads:
            raise OptionError(f"width {self.width} must be a multiple of heads {self.heads}", "width", "heads")
        if self.width * self.mlp_ratio < 1:
            raise OptionError(
                f"mlp_ratio {self.mlp_ratio} times width {self.width} is less than 1", "mlp_ratio", "width"
            )
        for router in self.routers:
            if router not in ROUTERS and not is_own(router):
                raise OptionError(
                    f"routers: {router!r} is none of {', '.join(ROUTERS)}, or package.module:factory", "routers"
                )
        for k in self.top_k:
            if not 1 <= k <= self.num_experts:
                raise OptionError(
                    f"top_k must be between 1 and num_experts = {self.num_experts}, got {k}", "top_k", "num_experts"
                )
        if not all(0 < factor <= MAX_CAPACITY_FACTOR for factor in self.capacity_factors):
            raise OptionError(
                f"capacity_factors must be positive and at most {MAX_CAPACITY_FACTOR:g}, got {self.capacity_factors}",
                "capacity_factors",
            )
        if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", self.device):
            raise OptionError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {self.device!r}", "device")

    def optimisation(self) -> Optimisation:
        """Makes the hyperparameters of every run: AdamW, a tenth of the steps as warm-up, then a cosine to 0."""
        return Optimisation(learning_rate=self.learning_rate)
