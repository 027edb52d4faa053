"""What a study is: its data, models, recipe and routers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from vmoe_routers.routers import ROUTERS
from vmoe_routers.training.loop import Recipe


@dataclass(frozen=True)
class Settings:
    """The study's settings; each is an option of ``vmoe-routers study``.

    Args:
        data: "digits", a folder with IDX files (MNIST, Fashion-MNIST), or a folder with train/ and val/.
        transfer_data: a second data set, for 10-shot transfer and its figure.
        output: where runs, table, figures and report go. What is there already is not run again.
        routers: names of routers; "dense" is always among the runs.
        top_k: experts per token, for Token Choice; several are compared.
        capacity_factors: several are compared.
        plan_combine: whether Sinkhorn Token Choice is also run with the plan's values as gates.
        seeds: how many; every seed has its own initialisation, data order and noise.
        epochs: passes over the data.
        batch_size: a multiple of group_size.
        learning_rate: AdamW's peak.
        image_size: resize images to this height and width.
        max_images: use at most so many training and as many test images.
        shift: random shifts by up to so many pixels.
        patch_size: pixels.
        width: of a token.
        mlp_ratio: hidden width of an MLP and of an expert, in widths. 1 instead of the usual 4 keeps the default short.
        depth: blocks; the last half has the MoE layers.
        heads: of the attention.
        num_experts: of every MoE layer.
        group_size: images routed together by the sparse routers (Soft MoE: 1).
        scale_init: start of Soft MoE's scale.
        device: "cpu" or "cuda".
        workers: runs side by side; 0: one for every CPU core of this process (on CUDA one).
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
        for name in ("seeds", "epochs", "batch_size", "patch_size", "width", "depth", "heads", "num_experts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("image_size", "max_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.group_size < 1 or self.batch_size % self.group_size:
            raise ValueError(f"batch_size {self.batch_size} must be a multiple of group_size {self.group_size}")
        for router in self.routers:
            if router not in ROUTERS:
                raise ValueError(f"no router {router!r}; there are {', '.join(ROUTERS)}")
        for k in self.top_k:
            if not 1 <= k <= self.num_experts:
                raise ValueError(f"top_k must be between 1 and num_experts = {self.num_experts}, got {k}")
        if not all(0 < factor < math.inf for factor in self.capacity_factors):
            raise ValueError(f"capacity_factors must be positive and finite, got {self.capacity_factors}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, got {self.learning_rate}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.workers < 0 or self.shift < 0:
            raise ValueError(f"workers and shift must be at least 0, got {self.workers} and {self.shift}")

    def recipe(self, seed: int) -> Recipe:
        """The training recipe of a seed's runs."""
        return Recipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            shift=self.shift,
            seed=seed,
        )
