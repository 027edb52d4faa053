"""Settings of a study: data, models, recipe and routers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from vmoe_routers.fields import check_field, check_fields
from vmoe_routers.models.vit import moe_block_indices
from vmoe_routers.options import MAX_CAPACITY_FACTOR, OptionError, did_you_mean
from vmoe_routers.routers import ROUTERS
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.own import is_own
from vmoe_routers.training.loader import MOST_WORKERS
from vmoe_routers.training.optimisation import Optimisation
from vmoe_routers.training.transforms import Augmentation

MOST_BLOCKS = 1_000_000  # blocks that are listed to check `moe_blocks`; no machine holds more
_MAX = (1 << 31) - 1
_LIMITS = {
    **dict.fromkeys(("seeds", "ablation_seeds"), 10_000),
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
        capacity_factors: slots of all experts per token (Token Choice: times K), a list to compare.
        plan_combine: whether Sinkhorn Token Choice also runs with the plan's entries as weights.
        batch_priority: whether Softmax Token Choice also runs with batch priority.
        ablations: names of ablations, which run after the comparison.
        seeds: number of seeds. Every seed has its own initialisation, data order and noise.
        first_seed: the first seed. Studies without a common seed are independent, except for their images.
        ablation_seeds: number of seeds of an ablation, at most. An ablation has the first seeds of the comparison.
        holdout: training images that no model trains on: the last ones, or evenly spaced ones if the images are
            sorted by class. Curves are measured on these images. The test images are measured once, after the last
            epoch. With 0, curves are measured on the test images.
        choosing: measure the held-out images only, to choose hyperparameters. The test images are not used.
        epochs: passes over the data.
        batch_size: a multiple of group_size.
        learning_rate: peak learning rate of AdamW.
        learning_rates: peak learning rates of single routers by name, in place of learning_rate. The dense ViT is
            "dense".
        training: further options of the training by name: fields of `Optimisation` and `Augmentation`, and head_bias,
            the initial value of the head's bias.
        stream: read images from disk at every use. Without it, all images are kept in memory.
        data_workers: processes that read images for each run, where images are read from disk or augmented one by one.
        image_size: resize images to this height and width. Default: their own size, or 32 for images in files.
        max_images: use at most this many training images and this many test images.
        shift: largest random shift of a training image, in pixels.
        patch_size: height and width of a patch, in pixels.
        width: width of a token.
        mlp_ratio: hidden width of an MLP or expert, in token widths. 1 makes the study shorter than the usual 4.
        depth: number of blocks.
        moe_blocks: blocks with a MoE layer: last_half, last_N, or every_N.
        heads: number of attention heads.
        num_experts: experts of every MoE layer.
        group_size: images that are routed together. Soft MoE always routes one image.
        scale_init: initial value of Soft MoE's scale.
        identical_experts: whether all experts of a layer start as copies of one expert.
        device: "cpu", "cuda" or "cuda:N".
        save_models: keep the trained models in the folder "models" of the output, for from_pretrained.
        workers: runs at the same time. 0 means one per CPU core that has enough memory, or one run on CUDA.
    """

    data: str = "digits"
    transfer_data: str | None = None
    output: Path = Path("study")
    routers: list[str] = field(default_factory=lambda: list(ROUTERS))
    top_k: list[int] = field(default_factory=lambda: [1, 2])
    capacity_factors: list[float] = field(default_factory=lambda: [1.0])
    plan_combine: bool = True
    batch_priority: bool = False
    ablations: list[str] = field(default_factory=list)
    seeds: int = 3
    first_seed: int = 0
    ablation_seeds: int = 3
    holdout: int = 0
    choosing: bool = False
    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 2e-3
    learning_rates: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    data_workers: int = 0
    image_size: int | None = None
    max_images: int | None = None
    shift: int = 1
    patch_size: int = 2
    width: int = 64
    mlp_ratio: float = 1.0
    depth: int = 4
    moe_blocks: str = "last_half"
    heads: int = 4
    num_experts: int = 8
    group_size: int = 8
    scale_init: float = 16.0
    identical_experts: bool = False
    device: str = "cpu"
    save_models: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name, most in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise OptionError(f"{name} must be at least 1 and at most {most}, got {value}", name)
        at_least_0 = dict.fromkeys(("first_seed", "shift", "holdout", "workers"), _MAX) | {"data_workers": MOST_WORKERS}
        for name, most in at_least_0.items():
            if not 0 <= getattr(self, name) <= most:
                raise OptionError(f"{name} must be at least 0 and at most {most}, got {getattr(self, name)}", name)
        if not math.isfinite(self.scale_init):
            raise OptionError(f"scale_init must be finite, got {self.scale_init}", "scale_init")
        for name in ("learning_rate", "mlp_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be positive and finite, got {getattr(self, name)}", name)
        for name in ("data", "transfer_data", "routers", "top_k", "capacity_factors"):
            if getattr(self, name) in ("", []):
                raise OptionError(f"{name} must not be empty", name)
        for router, rate in self.learning_rates.items():
            if router not in ("dense", *self.routers):
                raise OptionError(
                    f"learning_rates: {router!r} is none of dense, {', '.join(self.routers)}", "learning_rates"
                )
            if not 0 < rate < math.inf:
                raise OptionError(f"learning_rates: {router} must be positive and finite, got {rate}", "learning_rates")
        self._check_training()
        for name in self.ablations:
            if name not in ABLATIONS:
                raise OptionError(f"ablations: {name!r} is none of {', '.join(ABLATIONS)}", "ablations")
        if self.choosing and not self.holdout:
            raise OptionError("choosing measures held-out images, and holdout is 0", "choosing", "holdout")
        try:
            moe_block_indices(min(self.depth, MOST_BLOCKS), self.moe_blocks)
        except ValueError as error:
            raise OptionError(str(error).partition(": ")[2], "moe_blocks", "depth") from None
        if self.batch_size % self.group_size:
            raise OptionError(
                f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}",
                "batch_size",
                "group_size",
            )
        parts = self.training.get("accumulate", 1)
        if self.batch_size % (self.group_size * parts):
            raise OptionError(
                f"training: accumulate {parts} times group_size {self.group_size} must divide batch_size "
                f"{self.batch_size}",
                "training",
                "group_size",
                "batch_size",
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
                    f"routers: {router!r} is none of {', '.join(ROUTERS)}, or package.module:factory"
                    f"{did_you_mean(router, ROUTERS)}",
                    "routers",
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

    def _check_training(self) -> None:
        kinds = get_type_hints(Optimisation) | get_type_hints(Augmentation) | {"head_bias": float}
        for name in ("learning_rate", "image_size", "shift", "ema"):  # a study does not measure averages
            del kinds[name]
        for name, value in self.training.items():
            if name not in kinds:
                meant = did_you_mean(name, kinds)
                raise OptionError(
                    f"training: no option {name!r}; there are {', '.join(sorted(kinds))}{meant}", "training"
                )
            try:
                check_field(name, value, kinds[name])
            except OptionError as error:
                raise OptionError(f"training: {error}", "training") from None
        if not math.isfinite(self.training.get("head_bias", 0.0)):
            raise OptionError(f"training: head_bias must be finite, got {self.training['head_bias']}", "training")
        try:
            self.optimisation()
            self.augmentation(self.shift + 1)  # the size of the images is not known yet
        except OptionError as error:
            raise OptionError(f"training: {error}", "training") from None

    def optimisation(self) -> Optimisation:
        """Makes the hyperparameters of every run: AdamW, a tenth of the steps as warm-up, then a cosine to 0.

        The option `training` changes them.
        """
        return Optimisation(**{"learning_rate": self.learning_rate, **self._training_of(Optimisation)})

    def augmentation(self, image_size: int) -> Augmentation:
        """Makes the augmentation of every run: shifts, and what the option `training` changes."""
        chosen: dict[str, Any] = {"scale": None, "hflip": 0.0, "shift": self.shift, "normalization": "none"}
        chosen |= {"crop_pct": 1.0, "interpolation": "bilinear"}
        chosen |= self._training_of(Augmentation)
        if chosen["scale"] is not None:
            chosen |= {"scale": tuple(chosen["scale"]), "shift": 0}
        return Augmentation(image_size=image_size, **chosen)

    def _training_of(self, options: type[Optimisation | Augmentation]) -> dict[str, Any]:
        """Returns the values of `training` that are fields of the dataclass."""
        names = {option.name for option in fields(options)}
        return {name: value for name, value in self.training.items() if name in names}
