"""Subject: a model, the data on which it is measured, and the transform from images to its input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vmoe_routers.checkpoints.pretrained import CONFIG, read_preprocessing
from vmoe_routers.options import OptionError
from vmoe_routers.training.models import folder_of, load_model, refuse_names
from vmoe_routers.training.samples import Data
from vmoe_routers.training.settings import SETTINGS, read_settings
from vmoe_routers.training.sources import open_data
from vmoe_routers.training.transforms import (
    NORMALIZATIONS,
    PREPROCESSING,
    Augmentation,
    Transform,
    default_augmentation,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """Model and its data.

    Attributes:
        model: the model, on its device and in its dtype, in eval mode.
        data: the data set.
        transform: from the data set's images to the model's input.
        origin: source of the normalization and the crop, in words.
    """

    model: nn.Module
    data: Data
    transform: Transform
    origin: str

    def input(self) -> dict[str, Any]:
        """Describes the model's input, for reports."""
        options = self.transform.augmentation
        return {
            "image_size": options.image_size,
            "channels": self.transform.channels,
            "normalization": options.normalization,
            "crop_pct": options.crop_pct,
            "interpolation": options.interpolation,
            "chosen_by": self.origin,
        }

    def __str__(self) -> str:
        """Describes the model's input in one line."""
        options = self.transform.augmentation
        return (
            f"{self.transform.channels} x {options.image_size} x {options.image_size}, "
            f"normalization {options.normalization}, crop {options.crop_pct:g} ({self.origin})"
        )


def open_subject(
    model: str,
    data: str,
    *,
    data_root: str | Path | None = None,
    image_size: int | None = None,
    normalization: str | None = None,
    crop_pct: float | None = None,
    pretrained: bool = False,
    model_args: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> Subject:
    """Loads a model with its own head, and opens a data set.

    Normalization, crop and filter are the same as in the model's training, if they are known: from the model's
    config.json, from settings.yaml beside the model's folder (models of early versions), or from timm's
    configuration of its weights. Otherwise `default_augmentation` chooses.

    Args:
        model, pretrained: arguments of `load_model`.
        model_args: further arguments of `load_model`.
        data, data_root: arguments of `open_data`.
        image_size: height and width of the model's input. None: the model's own.
        normalization, crop_pct: replace the known values. `Augmentation` describes them.
        device, dtype: device and dtype of the model.

    Raises:
        OptionError: The model does not exist, or an option does not fit it.
        DataError: The data do not exist or cannot be read.
    """
    found = load(model, image_size, pretrained, model_args, device, dtype)
    opened = open_data(data, data_root=data_root)
    size = image_size or input_size(found, model)
    default = default_augmentation(opened, size)
    augmentation, origin = known_augmentation(model, found, pretrained, default, normalization, crop_pct)
    return Subject(found, opened, Transform(augmentation, channels_of(found, model), training=False), origin)


def load(
    model: str,
    image_size: int | None,
    pretrained: bool,
    model_args: Mapping[str, Any] | None,
    device: torch.device | str,
    dtype: str,
) -> nn.Module:
    """Loads the model of `open_subject`."""
    if dtype not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}", "dtype")
    if not model:
        raise OptionError("model must not be empty", "model")
    refuse_names(model_args or {}, {name: f"the option {name}" for name in ("image_size", "pretrained")})
    found = load_model(model, image_size=image_size, pretrained=pretrained, **(model_args or {}))
    return found.to(device, DTYPES[dtype]).eval()


def channels_of(model: nn.Module, name: str) -> int:
    """Returns the number of input channels of the model's first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise OptionError(f"model {name!r} has no convolution, which would tell the channels of its input", "model")
    return first.in_channels


def input_size(model: nn.Module, name: str) -> int:
    """Returns the side of the model's square input, in pixels.

    Raises:
        OptionError: the input is not square.
    """
    patches, config = getattr(model, "patch_embed", None), _config(model)
    size = getattr(patches, "img_size", None) or config.get("input_size", (3, 224, 224))[1:]
    for of_other_packages in (model, getattr(model, "config", None)):  # torchvision, transformers
        side = getattr(of_other_packages, "image_size", None)
        size = (side, side) if isinstance(side, int) else size
    if len(set(size)) != 1:
        raise OptionError(f"model {name!r} takes images of {size[0]} x {size[1]} pixels, wanted a square", "model")
    return int(size[0])


def _config(model: nn.Module) -> dict[str, Any]:
    """Returns timm's configuration of the model's weights, or nothing for models of other packages."""
    config: Any = getattr(model, "pretrained_cfg", None)
    return config or {}


def known_augmentation(
    model: str,
    found: nn.Module,
    pretrained: bool,
    default: Augmentation,
    normalization: str | None = None,
    crop_pct: float | None = None,
) -> tuple[Augmentation, str]:
    """Finds normalization, crop and filter of a model's training, and their source in words.

    Values that are not known come from `default`. `normalization` and `crop_pct` replace the values that were found.
    """
    augmentation, origin = _known(model, found, pretrained, default)
    given = {"normalization": normalization, "crop_pct": crop_pct}
    given = {name: value for name, value in given.items() if value is not None}
    return (replace(augmentation, **given), f"{origin}, and options") if given else (augmentation, origin)


def _known(model: str, found: nn.Module, pretrained: bool, default: Augmentation) -> tuple[Augmentation, str]:
    model, _ = folder_of(model)
    settings = Path(model).parent / SETTINGS
    known = read_preprocessing(model) if Path(model).is_dir() else None
    if known is not None:
        values, origin = known, str(Path(model) / CONFIG)
    elif Path(model).is_dir() and settings.is_file():
        values, origin = read_settings(settings), str(settings)
    elif pretrained and timm.is_model(model):
        config, origin = _config(found), "timm's weights"
        names = {value: name for name, value in NORMALIZATIONS.items()}
        values = {**config, "normalization": names.get((tuple(config["mean"]), tuple(config["std"])))}
        if values["normalization"] is None:
            raise OptionError(
                f"model {model!r} requires pixels of mean {config['mean']} and deviation {config['std']}; "
                f"there are {', '.join(NORMALIZATIONS)}",
                "model",
            )
    else:
        return default, "default"
    return replace(default, **{name: values[name] for name in PREPROCESSING if name in values}), origin
