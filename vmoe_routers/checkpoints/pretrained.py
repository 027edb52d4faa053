"""Models in folders: config.json and model.safetensors, as on the Hugging Face hub.

config.json holds the arguments of `vit_moe`; model.safetensors holds all parameters and buffers by name, unsharded. The
files do not depend on the number of processes or the device of the model.
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
    """Writes a model of `vit_moe` to a folder, for `from_pretrained`.

    The files keep dtypes, and store shared tensors separately. They do not keep which parameters are frozen, hooks, or
    dropout rates that were changed after construction.

    Args:
        model: The model. Its `moe_config` gives the arguments; later calls of `reset_classifier` and `set_input_size`
            are taken into account.
        folder: Created if missing. Existing files of these names are replaced atomically.
        state_dict: Unsharded tensors that replace `model.state_dict()`, for a sharded model.

    Raises:
        CheckpointError: `vit_moe` did not make the model, or its arguments would make another one because the model
            was changed; JSON cannot represent an argument; or the folder cannot be written.
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
    from vmoe_routers import __version__  # set only after this module is imported

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
        raise CheckpointError(f"save_pretrained: JSON cannot represent an argument of the model ({error})") from None
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write_whole(folder / CONFIG, lambda path: path.write_text(text + "\n"))
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read it
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
    """Loads a model that `save_pretrained` wrote, on the CPU, in eval mode, in the dtypes of the file.

    Loading draws no random numbers.

    Args:
        source: A folder; or, if no such folder exists, a repository on the Hugging Face hub, "user/name".
        revision, cache_dir, token, local_files_only: Arguments of `huggingface_hub.hf_hub_download`.
        changes: Arguments of `vit_moe` that replace the saved ones, such as capacity_factor or group_size. The shapes
            of the parameters must not change.

    Returns:
        The model.

    Raises:
        CheckpointError: A file is missing, damaged, or of a newer format; or its tensors differ from those of the model
            that the arguments make. The message lists all differences.
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
            f"{source}: no such folder; for a repository on the hub: pip install huggingface_hub"
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
    except (OSError, ValueError) as error:  # the hub's errors are subclasses of these
        raise CheckpointError(f"{source}: no such folder, and the hub does not provide {name} ({error})") from error


def _read_config(path: str) -> dict[str, Any]:
    with open_file(path) as (file, size):
        if size > _MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path}: {size} bytes, wanted a configuration of at most {_MAX_CONFIG_BYTES}")
        try:
            config = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    version = config.get("format_version") if isinstance(config, dict) else None
    if type(version) is not int or config.get("architecture") != _ARCHITECTURE:
        raise CheckpointError(f"{path}: not a configuration of a vmoe_routers model")
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
        pass  # raises the error for a file that cannot be opened
    try:
        with safe_open(weights_path, framework="pt") as file:
            stored = _names_now(set(file.keys()))
            shapes = {name: tuple(file.get_slice(old).get_shape()) for name, old in stored.items()}
            # A scale of Soft MoE under its old name has no axes.
            for name, shape in shapes.items():
                if stored[name] != name and not shape:
                    shapes[name] = (1,)
            _check_counts(arguments, shapes, config_path)
            # Build on the meta device first: absurd arguments in a bad file must not exhaust memory.
            model = make_empty(arguments, config_path)
            _compare(model, shapes, f"{weights_path}: not the model of {config_path}")
            tensors = {name: file.get_tensor(old).clone().reshape(shapes[name]) for name, old in stored.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights_path}: not a safetensors file, or damaged ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:  # all tensors of a model are floating point
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
    """Refuses counts that drive loops if they exceed what the weights can hold."""
    limits = {
        "depth": len(shapes),
        "num_experts": max((extent for shape in shapes.values() for extent in shape), default=0),
    }
    for name, limit in limits.items():
        count = arguments.get(name)
        if isinstance(count, int) and count > limit and not (name == "num_experts" and arguments.get("router") is None):
            raise CheckpointError(f"{path}: {name} is {count}, more than the parameters in {WEIGHTS} allow")


def make_empty(arguments: dict[str, Any], where: str) -> Any:
    """Makes the model of these arguments on the meta device.

    Raises:
        CheckpointError: The arguments are wrong. The message begins with `where`.
    """
    from vmoe_routers.models import vit_moe

    try:
        with torch.device("meta"):
            return vit_moe(**arguments)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{where}: wrong arguments of vit_moe ({error})") from error


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
    """Reads the arguments that timm's methods may have changed since the model was made."""
    sizes = {name: getattr(model.patch_embed, name) for name in ("img_size", "patch_size")}
    return {
        **{name: side if side == other else (side, other) for name, (side, other) in sizes.items()},
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
    }


def _whole(name: str, tensor: Tensor) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        kind = "meta tensor" if getattr(tensor, "is_meta", False) else type(tensor).__name__
        raise CheckpointError(f"save_pretrained: {name} is a {kind}, wanted an unsharded tensor, given by state_dict")
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
