"""Models in folders: config.json and model.safetensors, the names and the form that the Hugging Face hub knows.

config.json holds the arguments of `vit_moe`, model.safetensors every parameter and buffer whole, by its name. Nothing
in them depends on how many processes, or what device, the model was on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.checkpoints._files import open_file
from vmoe_routers.checkpoints.error import CheckpointError
from vmoe_routers.files import write_whole
from vmoe_routers.ops._dtypes import FLOATS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT_VERSION = 1
_ARCHITECTURE = "vit_moe"
_MAX_CONFIG_BYTES = 1 << 20


def save_pretrained(
    model: nn.Module, folder: str | os.PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None
) -> None:
    """Write a model of `vit_moe` to a folder, from which `from_pretrained` makes it again.

    model       its arguments are its `moe_config`; another head or pooling since (`reset_classifier`) and other
                sizes of images or patches (`set_input_size`) are taken into account
    folder      made where there is none. Files of these names in it are replaced, each in one step
    state_dict  in place of `model.state_dict()`: whole tensors where the model holds only a part of them

    Dtypes are kept. Tensors that share memory are written each by itself. Which parameters are frozen, dropout's rates
    apart from the arguments, and hooks are not kept.

    Raises CheckpointError: a model that vit_moe did not make, or that was changed since, so that its arguments make
    another; an argument that JSON cannot hold; a folder that cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    config = getattr(model, "moe_config", None)
    if not isinstance(config, dict):
        raise CheckpointError(
            f"save_pretrained: {type(model).__name__} has no moe_config, wanted a model that vit_moe made"
        )
    config = {**config, **_changed_since(model)}
    tensors = {name: _whole(name, tensor) for name, tensor in (state_dict or model.state_dict()).items()}
    _compare(
        make_empty(config, "save_pretrained"), tensors, "save_pretrained: the model is not what its moe_config makes"
    )
    from vmoe_routers import __version__  # which is set after this module is imported

    try:
        text = json.dumps(
            {
                "architecture": _ARCHITECTURE,
                "arguments": config,
                "format_version": FORMAT_VERSION,
                "vmoe_routers_version": __version__,
            },
            indent=2,
            allow_nan=False,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"save_pretrained: an argument of the model does not go into JSON ({error})") from None
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write_whole(folder / CONFIG, lambda path: path.write_text(text + "\n"))
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes it the owner's alone
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{str(folder)!r}: cannot be written ({error})") from error


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    **changes: Any,
) -> Any:
    """The model that `save_pretrained` wrote, on the CPU, in evaluation mode as the hub's mixins give it.

    source   a folder, which needs no network; or, where there is no such folder, a repository on the Hugging Face hub,
             "user/name". revision, cache_dir, token and local_files_only are those of `huggingface_hub`
    changes  arguments of `vit_moe` in place of those that are saved, such as capacity_factor or group_size; the
             parameters' shapes must stay as they are

    Parameters have the dtypes of the file. No random number is drawn.

    Raises CheckpointError, which names the file: absent, damaged, of a newer format, or with tensors other than those
    of the model that the arguments make (every difference is listed).
    """
    config_path, weights_path = (
        _locate(os.fspath(source), name, revision, cache_dir, token, local_files_only) for name in (CONFIG, WEIGHTS)
    )
    arguments = {**_read_config(config_path), **changes}
    return _load(arguments, config_path, weights_path)


def _locate(source: str, name: str, revision: Any, cache_dir: Any, token: Any, local_files_only: bool) -> str:
    if os.path.exists(source) or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return os.path.join(source, name)
    try:
        from huggingface_hub import hf_hub_download
    except ImportError:
        raise CheckpointError(
            f"{source}: there is no such folder; for a repository on the hub: pip install huggingface_hub"
        ) from None
    try:
        return hf_hub_download(
            source,
            name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            library_name="vmoe_routers",
        )
    except (OSError, ValueError) as error:  # the hub's own errors are among these
        raise CheckpointError(f"{source}: no such folder here, and the hub does not give {name} ({error})") from error


def _read_config(path: str) -> dict[str, Any]:
    with open_file(path) as (file, size):
        if size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, wanted a configuration of at most {_MAX_CONFIG_BYTES}")
        try:
            config = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: no valid JSON ({error})") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int or config.get("architecture") != _ARCHITECTURE:
        raise CheckpointError(f"{path}: no configuration of a model of vmoe_routers")
    if not 1 <= version <= FORMAT_VERSION:
        by = config.get("vmoe_routers_version")
        raise CheckpointError(
            f"{path}: format {version}, written by vmoe_routers {by}; this version reads up to {FORMAT_VERSION}"
        )
    arguments = config.get("arguments")
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: arguments are missing")
    return arguments


def _load(arguments: dict[str, Any], config_path: str, weights_path: str) -> Any:
    from safetensors import SafetensorError, safe_open

    with open_file(weights_path):
        pass  # the error where it cannot be
    try:
        with safe_open(weights_path, framework="pt") as file:
            stored = _names_now(set(file.keys()))
            shapes = {name: tuple(file.get_slice(old).get_shape()) for name, old in stored.items()}
            # A scale of Soft MoE under its old name has no axes.
            for name, shape in shapes.items():
                if stored[name] != name and not shape:
                    shapes[name] = (1,)
            _check_counts(arguments, shapes, config_path)
            # Without memory, so that arguments beyond belief cost none
            model = make_empty(arguments, config_path)
            _compare(model, shapes, f"{weights_path}: not the model of {config_path}")
            tensors = {name: file.get_tensor(old).clone().reshape(shapes[name]) for name, old in stored.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights_path}: no safetensors file, or a damaged one ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:  # what all of a model's are
            raise CheckpointError(
                f"{weights_path}: {name} is {tensor.dtype}, wanted one of {', '.join(map(str, FLOATS))}"
            )
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _names_now(names: set[str]) -> dict[str, str]:
    """From the names that parameters have now to their names in the file.

    Early files of version 0.1.0 have a router's parameters on the router itself.
    """
    found = {}
    for name in names:
        now = re.sub(r"(\.router)\.(weight|phi|scale)$", r"\1.logits.\2", name)
        found[name if now in names else now] = name
    return found


def _check_counts(arguments: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: str) -> None:
    """What is made in loops is no more than the weights hold."""
    limits = {
        "depth": len(shapes),
        "num_experts": max((extent for shape in shapes.values() for extent in shape), default=0),
    }
    for name, limit in limits.items():
        count = arguments.get(name)
        if isinstance(count, int) and count > limit and not (name == "num_experts" and arguments.get("router") is None):
            raise CheckpointError(f"{path}: {name} is {count}, more than there are parameters for in {WEIGHTS}")


def make_empty(arguments: dict[str, Any], where: str) -> Any:
    """The model of these arguments, without memory. CheckpointError, which begins with `where`: there is none."""
    from vmoe_routers.models import vit_moe

    try:
        with torch.device("meta"):
            return vit_moe(**arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where}: the arguments make no model ({error})") from error


def _compare(model: nn.Module, found: Mapping[str, Any], problem: str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in found.items()}
    differences = [
        f"{name}: {f'shape {list(shapes[name])}' if name in shapes else 'missing'}, wanted "
        f"{f'shape {list(wanted[name])}' if name in wanted else 'no such tensor'}"
        for name in sorted(wanted.keys() | shapes.keys())
        if wanted.get(name) != shapes.get(name)
    ]
    if differences:
        raise CheckpointError("\n  ".join([f"{problem}, {len(differences)} differences:", *differences]))


def _changed_since(model: Any) -> dict[str, Any]:
    """What timm's methods change of a model that is made."""
    sizes = {name: getattr(model.patch_embed, name) for name in ("img_size", "patch_size")}
    return {
        **{name: side if side == other else (side, other) for name, (side, other) in sizes.items()},
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
    }


def _whole(name: str, tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        kind = "tensor without memory" if getattr(tensor, "is_meta", False) else type(tensor).__name__
        raise CheckpointError(f"save_pretrained: {name} is a {kind}, wanted a whole tensor, which state_dict can bring")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
