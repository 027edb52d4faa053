"""Descriptions of models that `upcycle` changed, in plain values.

A description has the arguments with which another package made the model, and the modules that `upcycle` replaced.

A description from a file is untrusted: it may name only a few classes, and its arguments may load no file and no code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from vmoe_routers.checkpoints.error import CheckpointError

_FAMILIES = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit", "siglip", "clip")
"""Models of transformers that can be loaded. Their classes load no other file, whatever the config says."""

# Names that load files or code.
_REFUSED = {
    "timm": re.compile(r"pretrained.*|checkpoint_path|cache_dir|features_only"),
    "transformers": re.compile(r".*(attn|experts)_implementation.*|quantization_config|auto_map"),
}


def describe(model: nn.Module, model_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """Describes a model of timm, torchvision or transformers that `upcycle` changed.

    Args:
        model: The model.
        model_args: Further arguments of ``timm.create_model``.

    Raises:
        CheckpointError: It is not known how the model was made, or `model_args` do not fit the model.
    """
    library = plain_class(model).__module__.partition(".")[0]
    found = _DESCRIBE[library](model) if library in _DESCRIBE else None
    if found is None:
        raise CheckpointError(
            f"save_pretrained: {type(model).__name__} is no model of vit_moe, timm.create_model, torchvision or "
            "transformers, so from_pretrained could not make it; save its state_dict"
        )
    name, arguments = found
    if model_args and library != "timm":
        raise CheckpointError(f"save_pretrained: model_args are for a model of timm, and this is a model of {library}")
    replaced = [
        {"part": part, **arguments}
        for part, module in model.named_modules()
        for arguments in module.__dict__.get("upcycled", ())
    ]
    return {"library": library, "model": name, "arguments": {**arguments, **(model_args or {})}, "replaced": replaced}


def make(description: Mapping[str, Any]) -> nn.Module:
    """Makes the model of a description, with weights drawn anew.

    Raises:
        CheckpointError: The description is not plain, or names another class or a file.
    """
    from vmoe_routers.models import upcycle

    library, name, arguments, replaced = (description.get(k) for k in ("library", "model", "arguments", "replaced"))
    if library not in _MAKE or not isinstance(name, str) or not isinstance(arguments, dict):
        raise CheckpointError("the configuration names no model of timm, torchvision or transformers")
    for key in _keys(arguments):
        if library in _REFUSED and _REFUSED[library].fullmatch(key):
            raise CheckpointError(f"the configuration has the argument {key!r}, which a file must not set")
    model = _MAKE[library](name, arguments)
    for options in replaced or ():
        upcycle(model.get_submodule(options["part"]), **{k: v for k, v in options.items() if k != "part"})
    return model


def structure(model: nn.Module) -> dict[str, str]:
    """Lists class and printed arguments of every module by its name, without wrappers."""
    return {
        clean(name): f"{plain_class(module).__name__}({module.extra_repr()})" for name, module in model.named_modules()
    }


def clean(name: str) -> str:
    """Removes the names of wrappers (torch.compile, checkpointing, DDP, FSDP) from the name of a tensor or module."""
    inner = r"^(module\.|_orig_mod\.)+|(?<=\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(\.|$)"
    return re.sub(inner, "", name).rstrip(".")


def plain_class(module: nn.Module) -> type:
    """Gives the class of a module, without the subclass that FSDP2 makes."""
    classes = type(module).__mro__
    return classes[2] if classes[1].__name__ == "FSDPModule" else classes[0]


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [key for name, part in value.items() for key in (str(name), *_keys(part))]
    return [key for part in value for key in _keys(part)] if isinstance(value, list) else []


def _describe_timm(model: Any) -> tuple[str, dict[str, Any]] | None:
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        return None
    arguments = {"num_classes": model.num_classes, "embed_dim": model.embed_dim, "depth": len(model.blocks)}
    for key in ("global_pool", "dynamic_img_size"):
        if hasattr(model, key):
            arguments[key] = getattr(model, key)
    for key in ("img_size", "patch_size"):
        if getattr(model.patch_embed, key, None) is not None:
            arguments[key] = getattr(model.patch_embed, key)
    if hasattr(getattr(model.patch_embed, "proj", None), "in_channels"):
        arguments["in_chans"] = model.patch_embed.proj.in_channels
    if hasattr(model.blocks[0], "attn"):
        arguments["num_heads"] = model.blocks[0].attn.num_heads
    return name, arguments


def _make_timm(name: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    if not re.fullmatch(r"\w+", name) or not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name!r}")
    # JSON has no tuples.
    options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    return timm.create_model(name, pretrained=False, **options)


def _describe_torchvision(model: Any) -> tuple[str, dict[str, Any]] | None:
    if plain_class(model).__name__ != "VisionTransformer":
        return None
    layers = model.encoder.layers
    names = ("image_size", "patch_size", "hidden_dim", "mlp_dim", "dropout", "attention_dropout", "representation_size")
    head = getattr(model.heads, "head", None)
    arguments = {name: getattr(model, name) for name in names}
    arguments["num_classes"] = getattr(head, "out_features", model.num_classes)
    return "VisionTransformer", {**arguments, "num_layers": len(layers), "num_heads": layers[0].num_heads}


def _make_torchvision(name: str, arguments: dict[str, Any]) -> nn.Module:
    import torchvision

    if name != "VisionTransformer":
        raise CheckpointError(f"torchvision's {name!r} is not a VisionTransformer")
    return torchvision.models.VisionTransformer(**arguments)


def _describe_transformers(model: Any) -> tuple[str, dict[str, Any]] | None:
    kind = plain_class(model)
    if _of_family(kind):
        config = json.loads(model.config.to_json_string(use_diff=False))
        return kind.__name__, {key: value for key, value in config.items() if key != "_name_or_path"}
    return None


def _make_transformers(name: str, arguments: dict[str, Any]) -> nn.Module:
    import transformers  # pyright: ignore[reportMissingImports]  # optional

    kind: Any = getattr(transformers, name, None) if name.isidentifier() else None
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel) or not _of_family(kind):
        raise CheckpointError(f"{name!r} of transformers is not one of the models {', '.join(_FAMILIES)}")
    config: Any = kind.config_class
    return kind(config.from_dict(arguments))


def _of_family(kind: type) -> bool:
    return kind.__module__ in {f"transformers.models.{name}.modeling_{name}" for name in _FAMILIES}


_DESCRIBE = {"timm": _describe_timm, "torchvision": _describe_torchvision, "transformers": _describe_transformers}
_MAKE = {"timm": _make_timm, "torchvision": _make_torchvision, "transformers": _make_transformers}
