"""Settings of a training: data, model, optimisation, state, devices."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, get_args

import yaml
from yaml.constructor import ConstructorError

from vmoe_routers.distributed.parallelize import Checkpointing
from vmoe_routers.fields import check_fields
from vmoe_routers.options import MAX_CAPACITY_FACTOR, OptionError
from vmoe_routers.training.loader import BAD_IMAGES, MOST_WORKERS
from vmoe_routers.training.optimisation import Optimisation, at_least, only
from vmoe_routers.training.transforms import Augmentation
from vmoe_routers.unique_keys import UniqueKeys

SETTINGS = "settings.yaml"
"""Name of the file of settings in the output folder of a training."""

KEEP = ("last", "best", "every")
PARALLEL = ("ddp", "fsdp")


@dataclass(frozen=True)
class TrainSettings(Optimisation, Augmentation):
    """Settings of a training. Each is an option of ``vmoe-routers train``.

    Args:
        data: "digits", a folder, or another name that `open_data` takes (docs/data.md).
        data_root: folder of data sets of torchvision, also for downloads.
        image_size: height and width of the model's images, in pixels. None: the images' own, or 224 if they differ.
        output: the folder for settings, log, checkpoints and the model. The same command continues a training there.
        model: "vit_moe", a model of timm, a folder of save_pretrained, a study's record (runs/*-seed*.json), or P of a
            V-MoE checkpoint (P.index).
        model_args: further arguments of the model, such as embed_dim of vit_moe.
        router: one of `vmoe_routers.ROUTERS`, package.module:factory, or "dense" for no MoE layers. None: the model's.
        num_experts: experts of every MoE layer. None: the model's own number.
        capacity_factor: slots of all experts per token (Token Choice: times top_k). None: the router's own.
        top_k: experts per token, with Token Choice. None: the router's own.
        group_size: images that are routed together. None: the model's own.
        upcycle: router of the MoE layers that replace MLPs of the model. Experts start as copies of the MLP.
        pretrained: start from timm's weights of the model, which are downloaded.
        head_bias: initial value of the head's bias, such as -10 for the sigmoid loss. None: the model's.
        epochs: passes over the training images.
        batch_size: images per step, on all ranks together. An incomplete last batch of an epoch is left out.
        seed: seed of initialisation, order, augmentation, noise and dropout.
        workers: processes per rank that load images. The results do not depend on their number.
        bad_images: "stop" ends the training at an unreadable image, "skip" takes the next readable image instead,
            and counts the unreadable image.
        evaluate_every: steps between evaluations. None: an epoch.
        save_every: steps between checkpoints. None: as evaluate_every.
        log_every: steps between rows of the log.
        keep: checkpoints that are kept: the "last" two (always), the "best" by accuracy, or "every" one.
        device: "auto", "cpu" or "cuda".
        compile: compile the blocks by torch.compile.
        checkpointing: activation checkpointing: "none", "full", or "exchange_saved", which does not repeat the exchange
            of expert parallelism.
        parallel: on several ranks: "ddp" or "fsdp".
        replicate: copies of a model that is sharded by fsdp.
        ep: ranks that share the experts of a layer. More than 1 needs fsdp.
    """

    data: str = "digits"
    data_root: Path | None = None
    image_size: int | None = None  # type: ignore[assignment]  # an int in Augmentation
    output: Path = Path("runs/train")
    model: str = "vit_moe"
    model_args: dict[str, Any] = field(default_factory=dict)
    router: str | None = None
    num_experts: int | None = None
    capacity_factor: float | None = None
    top_k: int | None = None
    group_size: int | None = None
    upcycle: str | None = None
    pretrained: bool = False
    head_bias: float | None = None
    epochs: int = 30
    batch_size: int = 128
    seed: int = 0
    workers: int = 2
    bad_images: str = "stop"
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int = 10
    keep: list[str] = field(default_factory=lambda: ["last", "best"])
    device: str = "auto"
    compile: bool = False
    checkpointing: str = "none"
    parallel: str = "ddp"
    replicate: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        check_fields(self)
        # YAML has lists instead of tuples, and strings instead of paths.
        for name, kind in (("scale", tuple), ("ratio", tuple), ("output", Path), ("data_root", Path)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, kind(getattr(self, name)))
        Optimisation.__post_init__(self)
        self.augmentation(self.image_size or max(224, self.shift + 1))  # the data may have larger images
        at_least(self, 1, "epochs", "batch_size", "log_every", "replicate", "ep", "evaluate_every", "save_every")
        at_least(self, 1, "num_experts", "top_k", "group_size", "image_size")
        if self.capacity_factor is not None and not 0 < self.capacity_factor <= MAX_CAPACITY_FACTOR:
            raise OptionError(
                f"capacity_factor must be positive and at most {MAX_CAPACITY_FACTOR:g}, got {self.capacity_factor}",
                "capacity_factor",
            )
        at_least(self, 0, "seed", "workers")
        if self.workers > MOST_WORKERS:
            raise OptionError(f"workers must be at most {MOST_WORKERS}, got {self.workers}", "workers")
        if self.head_bias is not None and not math.isfinite(self.head_bias):
            raise OptionError(f"head_bias must be finite, got {self.head_bias}", "head_bias")
        choices = {"bad_images": BAD_IMAGES, "checkpointing": get_args(Checkpointing), "parallel": PARALLEL}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}", name)
        if not self.keep or not set(self.keep) <= set(KEEP):
            raise OptionError(f"keep must be a list of {', '.join(KEEP)}, got {self.keep}", "keep")
        if not re.fullmatch(r"auto|cpu|cuda", self.device):
            raise OptionError(f"device must be 'auto', 'cpu' or 'cuda', got {self.device!r}", "device")
        if self.batch_size % self.accumulate:
            raise OptionError(
                f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}",
                "batch_size",
                "accumulate",
            )
        if self.upcycle is not None and self.router is not None:
            raise OptionError(
                f"upcycle {self.upcycle!r} and router {self.router!r} exclude each other", "upcycle", "router"
            )
        if self.ep > 1 and self.parallel != "fsdp":
            raise OptionError(f"ep {self.ep} needs parallel 'fsdp', got {self.parallel!r}", "ep", "parallel")

    def to_dict(self) -> dict[str, Any]:
        """Converts the settings to values that YAML and JSON can represent."""
        return json.loads(
            json.dumps(asdict(self), default=lambda value: float(value) if isinstance(value, Real) else str(value))
        )

    def augmentation(self, image_size: int) -> Augmentation:
        """Makes the augmentation for images of this size."""
        return Augmentation(**{**only(Augmentation, asdict(self)), "image_size": image_size})


# Settings that may change when a training continues.
MAY_CHANGE = ("output", "data_root", "workers", "log_every", "keep", "device", "compile", "checkpointing")
MAY_CHANGE += ("parallel", "replicate", "ep", "save_every", "evaluate_every", "bad_images", "max_skipped")


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings of a training: a dict of options by name.

    Raises:
        ValueError: The file is not YAML, is not a mapping, or has a key twice.
        OSError: The file cannot be read.
    """
    try:
        found = yaml.load(path.read_text(), UniqueKeys)
    except ConstructorError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from None
    if not isinstance(found, dict):
        kind = "nothing" if found is None else type(found).__name__
        raise ValueError(f"{path}: wanted options by name, got {kind}")
    if unnamed := [name for name in found if not isinstance(name, str)]:
        raise ValueError(f"{path}: wanted options by name, got {unnamed[0]!r} in place of a name")
    return found
