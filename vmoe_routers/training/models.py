"""Models by name: `vit_moe`, a timm name, a folder of `save_pretrained`, a study's record, or a V-MoE checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vmoe_routers.checkpoints.pretrained import CONFIG
from vmoe_routers.models import upcycle, vit_moe
from vmoe_routers.moe import MoEMlp
from vmoe_routers.options import OptionError, did_you_mean

_CHECKPOINT = ".index"  # V-MoE's suffix of the file that lists the shards
_KINDS = (
    "a folder of save_pretrained (runs/train/model), a study's record (study/runs/*-seed*.json), P of a V-MoE "
    "checkpoint (P.index), vit_moe, or a name of vmoe_routers.models.NAMES or of timm.list_models, such as "
    "soft_moe_small_patch16_224"
)


def load_model(
    model: str,
    *,
    num_classes: int | None = None,
    channels: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    upcycled: Mapping[str, Any] | None = None,
    pretrained: bool = False,
    **arguments: Any,
) -> nn.Module:
    """Makes the model, or loads the model and fits its head and positions to the data.

    A model that is made draws its parameters from torch's generator.

    Args:
        model: "vit_moe", a name of `timm.list_models`, which `vmoe_routers.models.NAMES` extends, a folder of
            `save_pretrained`, the record of a run of a study that kept its models, or the prefix P of a V-MoE
            checkpoint (P.index).
        num_classes: Outputs of the head. A loaded model with another number gets a new head. None: as in the model.
        channels: Channels of an image. None: as in the model.
        image_size: A side in pixels, or height and width. None keeps the model's size. The position embeddings of a
            loaded model are resampled.
        upcycled: Arguments of `upcycle`, which replaces MLPs of the model by MoE layers.
        pretrained: Downloads timm's weights of the model.
        arguments: Arguments of `vit_moe`, of timm's model, or of `from_pretrained`.

    Raises:
        OptionError: The model does not exist, or arguments do not fit. The error names options of `TrainSettings`.
        RecordError: The file is not the record of a run, or the study kept no model.
    """
    model, _ = folder_of(model)
    try:
        found = _load(model, num_classes, channels, image_size, pretrained, arguments)
        if upcycled is not None:
            if any(isinstance(module, MoEMlp) for module in found.modules()):
                raise OptionError(
                    f"upcycle replaces MLPs of a dense ViT, but model {model!r} has MoE layers; wanted for example "
                    "vit_small_patch16_224",
                    "upcycle",
                    "model",
                )
            upcycle(found, **upcycled)
    except OptionError:
        raise
    except OSError as error:
        if not pretrained:
            raise
        raise OptionError(f"pretrained weights of {model!r} cannot be loaded: {error}", "pretrained") from error
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise OptionError(f"model {model!r}: {error}", "model") from error
    return found


def refuse_names(arguments: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """Refuses further arguments of a model that have another origin, such as an option.

    Raises:
        OptionError: An argument has the name of a key of `origins`.
    """
    for name, origin in origins.items():
        if name in arguments:
            raise OptionError(f"model_args must not have {name!r}, which comes from {origin}", "model_args")


def folder_of(model: str) -> tuple[str, dict[str, Any] | None]:
    """Finds the folder of the model that a study kept, for the record of a run.

    Returns:
        The folder and the record. Any other name is returned unchanged, with None.

    Raises:
        OptionError: The name is a file within the folder of a model, or a file that is no record.
        RecordError: The study kept no model.
    """
    path = Path(model)
    if not path.is_file() or timm.is_model(model):
        return model, None
    if path.suffix == _CHECKPOINT:
        raise OptionError(
            f"model {model!r} lists the parts of a checkpoint; wanted {model[: -len(_CHECKPOINT)]}", "model"
        )
    if (path.parent / CONFIG).is_file():
        raise OptionError(f"model {model!r} is a file of a model; wanted its folder, {str(path.parent)!r}", "model")
    if path.suffix != ".json":
        raise OptionError(f"model {model!r} is a file; wanted {_KINDS}", "model")
    from vmoe_routers.study.kept import kept_model

    folder, record = kept_model(path)
    return str(folder), record


def _load(
    model: str,
    classes: int | None,
    channels: int | None,
    size: Any,
    pretrained: bool,
    arguments: Mapping[str, Any],
) -> nn.Module:
    if pretrained and (model == "vit_moe" or not timm.is_model(model)):
        raise OptionError(f"pretrained needs the name of a timm model with weights, got model {model!r}", "pretrained")
    chosen = {"num_classes": classes, "in_chans": channels, "img_size": size}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if model == "vit_moe":
        return vit_moe(**chosen, **arguments)
    if os.path.isdir(model):
        return _fitted(_from_folder(model, arguments), model, classes, channels, size)
    if os.path.isfile(model + _CHECKPOINT):
        return _fitted(_from_checkpoint(model, arguments), model, classes, channels, size)
    if not timm.is_model(model):
        raise OptionError(
            f"model {model!r} is no folder and no model of timm; wanted {_KINDS}"
            f"{did_you_mean(model, ['vit_moe', *timm.list_models()])}",
            "model",
        )
    try:
        return timm.create_model(model, pretrained=pretrained, **chosen, **dict(arguments))
    except TypeError as error:
        if size is None or "'img_size'" not in str(error):
            raise
        raise OptionError(
            f"model {model!r} is not a vision transformer: its input has no fixed size, img_size; wanted a ViT, such "
            "as vit_small_patch16_224",
            "model",
        ) from error


def _channels(count: int) -> str:
    return f"{count} channel{'' if count == 1 else 's'}"


def _from_folder(folder: str, arguments: Mapping[str, Any]) -> nn.Module:
    from vmoe_routers.checkpoints import from_pretrained

    inner = Path(folder) / "model"
    if (inner / CONFIG).is_file() and not (Path(folder) / CONFIG).exists():
        raise OptionError(f"model {folder!r} is the output folder of a training; its model is {str(inner)!r}", "model")
    if not (Path(folder) / CONFIG).exists():
        is_study = (Path(folder) / "study.json").is_file()
        what = "is the folder of a study" if is_study else f"is a folder without a model, {CONFIG} is missing"
        raise OptionError(f"model {folder!r} {what}; wanted {_KINDS}", "model")
    return from_pretrained(folder, **arguments)


def _from_checkpoint(prefix: str, arguments: Mapping[str, Any]) -> nn.Module:
    import tempfile

    from vmoe_routers.checkpoints.convert import convert

    with tempfile.TemporaryDirectory() as folder:
        return convert(prefix, str(Path(folder) / "model"), **arguments)


def _fitted(
    model: Any, name: str, classes: int | None, channels: int | None, size: int | tuple[int, int] | None
) -> nn.Module:
    """Fits head and positions of a loaded model to the data."""
    if channels is not None and channels != (expected := model.patch_embed.proj.in_channels):
        raise OptionError(
            f"model {name!r} takes images with {_channels(expected)}, the data have {_channels(channels)}", "model"
        )
    wanted = (size, size) if isinstance(size, int) else size
    if wanted is not None and not hasattr(model, "patch_embed"):
        raise OptionError(
            f"image_size: model {name!r} is of torchvision or transformers; its size is fixed", "image_size"
        )
    if wanted is not None and tuple(wanted) != tuple(model.patch_embed.img_size):
        patch = tuple(model.patch_embed.patch_size)
        if any(side % part for side, part in zip(wanted, patch, strict=True)):
            raise OptionError(
                f"image_size {size} is not a multiple of the patch size, {patch[0]} x {patch[1]}", "image_size"
            )
        with torch.no_grad():
            model.set_input_size(wanted)
    if classes is not None and classes != model.num_classes:
        model.reset_classifier(classes)
    return model
