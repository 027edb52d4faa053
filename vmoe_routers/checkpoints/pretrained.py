"""Models in folders: config.json and model.safetensors, as on the Hugging Face hub.

config.json holds the arguments of `vit_moe`, or describes a model of another package that `upcycle` changed
(`upcycled`). model.safetensors holds all parameters and buffers by name, unsharded. The files do not depend on the
number of processes or the device of the model.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.checkpoints import upcycled
from vmoe_routers.checkpoints._files import open_file
from vmoe_routers.checkpoints.error import CheckpointError
from vmoe_routers.files import write_whole
from vmoe_routers.moe import MoEMlp
from vmoe_routers.ops._dtypes import FLOATS
from vmoe_routers.routers.affinity import Sinkhorn, Softmax, SparsityConstrained

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FORMAT_VERSION = 1
_ARCHITECTURES = ("vit_moe", "upcycled")
_MAX_CONFIG_BYTES = 1 << 20


def save_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    model_args: Mapping[str, Any] | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> None:
    """Writes a model of `vit_moe`, or a model that `upcycle` changed, to a folder, for `from_pretrained`.

    The files keep dtypes, and store a shared tensor once per name. They do not record which parameters are frozen, and
    have no hooks. Dropout rates of a `vit_moe` model that were changed after construction are lost.

    The model may be wrapped by torch.compile, DistributedDataParallel, DataParallel, or an average of weights
    (`AveragedModel`, timm's `ModelEma`). The tensors of a model sharded by FSDP2 are gathered: every process calls this
    function, and the first one writes.

    Args:
        model: The model. Later calls of `reset_classifier` and `set_input_size` are taken into account. A model of
            another package must be made by ``timm.create_model``, or be torchvision's `VisionTransformer`, or a ViT,
            DeiT, DINOv2, DINOv3, SigLIP or CLIP of transformers.
        folder: Created if missing. Existing files of these names are replaced atomically.
        state_dict: Tensors that replace `model.state_dict()`, for a model sharded by another library.
        model_args: Arguments with which ``timm.create_model`` made an upcycled model, if the model does not record
            them. Every model records its name, sizes, head and pooling.
        preprocessing: How images become the model's input, such as the normalization, for `read_preprocessing`.

    Raises:
        CheckpointError: It is not known how the model was made, or the known arguments make another model, for example
            because an option of a router was changed after construction. Or JSON cannot represent an argument, or the
            folder cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    model = _unwrapped(model, sharded=state_dict is None)
    architecture, config = _describe(model, model_args)
    found = {upcycled.clean(name): tensor for name, tensor in (state_dict or model.state_dict()).items()}
    found.pop("n_averaged", None)  # an entry of AveragedModel's state_dict
    for name, tensor in found.items():
        if tensor.is_meta:
            raise CheckpointError(f"save_pretrained: {name} is a meta tensor, wanted values, given by state_dict")
    empty = _make_empty(architecture, config, "save_pretrained")
    _compare(empty, found, "save_pretrained: the model is not the one that its description makes")
    if architecture == "upcycled":
        _compare_structure(empty, model)
    _compare_routing(empty, model)
    tensors = _gather(found)
    if tensors is None:
        return
    from vmoe_routers import __version__  # set only after this module is imported

    try:
        text = json.dumps(
            {
                "architecture": architecture,
                "arguments": config,
                "format_version": FORMAT_VERSION,
                "vmoe_routers_version": __version__,
                **({} if preprocessing is None else {"preprocessing": dict(preprocessing)}),
            },
            indent=2,
            allow_nan=False,
        )
    except (TypeError, ValueError):
        unknown = _unknown_to_json({**config, **(preprocessing or {})})
        raise CheckpointError(
            f"save_pretrained: JSON cannot represent {unknown}, an argument of the model or a value of preprocessing. "
            "If it is an argument of the model, save model.state_dict(), and make the model again by code"
        ) from None
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        write_whole(folder / CONFIG, lambda path: path.write_text(text + "\n"))
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors makes it readable by the owner only
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
        source: A folder or, if no such folder exists, a repository on the Hugging Face hub, "user/name".
        revision, cache_dir, token, local_files_only: Arguments of `huggingface_hub.hf_hub_download`.
        changes: Arguments of `vit_moe`, or of `upcycle` for an upcycled model, that replace the saved ones, such as
            capacity_factor or group_size. The shapes of the parameters must not change.

    Returns:
        The model.

    Raises:
        CheckpointError: A file is missing, damaged, or of a newer format, or its tensors do not match the model that
            the arguments make. The message lists all differences.
    """
    config_path, weights_path = (
        _locate(os.fspath(source), name, revision, cache_dir, token, local_files_only) for name in (CONFIG, WEIGHTS)
    )
    architecture, arguments = _described(_read_config(config_path), config_path)
    if architecture == "vit_moe":
        arguments = {**arguments, **changes}
    else:
        arguments = {**arguments, "replaced": [{**options, **changes} for options in arguments["replaced"]]}
    return _load(architecture, arguments, config_path, weights_path)


def read_preprocessing(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the `preprocessing` of `save_pretrained`. Returns None if the model was saved without it.

    Raises:
        CheckpointError: The file is missing, damaged, or of a newer format.
    """
    path = os.path.join(folder, CONFIG)
    found = _read_config(path).get("preprocessing")
    if not isinstance(found, (dict, type(None))):
        raise CheckpointError(f"{path}: preprocessing is {found!r}, wanted values by name")
    return found


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
    if type(version) is not int or version < 1 or config.get("architecture") not in _ARCHITECTURES:
        raise CheckpointError(f"{path}: not a configuration of a vmoe_routers model")
    if version > FORMAT_VERSION:
        by = config.get("vmoe_routers_version")
        raise CheckpointError(
            f"{path}: format {version}, written by vmoe_routers {by}; this version reads up to {FORMAT_VERSION}; "
            "update vmoe_routers"
        )
    return config


def _described(config: dict[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    """Returns architecture and arguments."""
    arguments = config.get("arguments")
    if not isinstance(arguments, dict):
        raise CheckpointError(f"{path}: arguments are missing")
    if config["architecture"] == "upcycled":
        replaced = arguments.get("replaced")
        if not isinstance(replaced, list) or not replaced or not all(isinstance(options, dict) for options in replaced):
            raise CheckpointError(f"{path}: the description of the replaced layers is missing")
    return config["architecture"], arguments


def _load(architecture: str, arguments: dict[str, Any], config_path: str, weights_path: str) -> Any:
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
            # Build on the meta device first, because huge arguments in an untrusted file must not exhaust memory.
            model = _make_empty(architecture, arguments, config_path)
            _compare(model, shapes, f"{weights_path}: not the model of {config_path}")
            tensors = {name: file.get_tensor(old).clone().reshape(shapes[name]) for name, old in stored.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{weights_path}: not a safetensors file, or damaged ({error})") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:  # all tensors of a model are floating point
            raise CheckpointError(
                f"{weights_path}: {name} is {tensor.dtype}, wanted one of {', '.join(map(str, FLOATS))}"
            )
    if architecture == "upcycled":
        # Models of other packages have buffers that no file holds. So make the model again, with the values of its
        # buffers.
        with torch.random.fork_rng([]):
            model = upcycled.make(arguments)
    model.load_state_dict(tensors, assign=True)
    return model.to("cpu").eval()  # copies no parameter, but moves the other state of layers off the meta device


def _names_now(names: set[str]) -> dict[str, str]:
    """Maps the current names of parameters to their names in the file.

    Early files of version 0.1.0 have a router's parameters on the router itself.
    """
    found = {}
    for name in names:
        now = re.sub(r"(\.router)\.(weight|phi|scale)$", r"\1.logits.\2", name)
        found[name if now in names else now] = name
    return found


def _check_counts(arguments: dict[str, Any], shapes: dict[str, tuple[int, ...]], path: str) -> None:
    """Refuses numbers of layers and experts above the limits that the shapes of the weights set."""
    limits = {
        **dict.fromkeys(("depth", "num_layers", "num_hidden_layers"), len(shapes)),
        "num_experts": max((extent for shape in shapes.values() for extent in shape), default=0),
    }
    for name, count in _counts(arguments, limits):
        if count > limits[name]:
            raise CheckpointError(f"{path}: {name} is {count}, more than the parameters in {WEIGHTS} allow")


def _counts(arguments: Any, names: Container[Any]) -> Iterator[tuple[Any, int]]:
    """Lists the integers with these names at any depth. Skips num_experts of a dense model."""
    dense = isinstance(arguments, dict) and arguments.get("router", "") is None
    for name, value in arguments.items() if isinstance(arguments, dict) else enumerate(arguments):
        if isinstance(value, (dict, list)):
            yield from _counts(value, names)
        elif name in names and isinstance(value, int) and not (dense and name == "num_experts"):
            yield name, value


def make_empty(arguments: dict[str, Any], where: str) -> Any:
    """Makes the model of these arguments on the meta device.

    Raises:
        CheckpointError: The arguments are wrong. The message begins with `where`.
    """
    return _make_empty("vit_moe", arguments, where)


def _make_empty(architecture: str, arguments: dict[str, Any], where: str) -> Any:
    from vmoe_routers.models import vit_moe

    # Other packages raise errors of every kind for a wrong configuration.
    wrong = (TypeError, ValueError, RuntimeError, OverflowError) if architecture == "vit_moe" else Exception
    try:
        with torch.device("meta"):
            return vit_moe(**arguments) if architecture == "vit_moe" else upcycled.make(arguments)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except wrong as error:
        made_by = "vit_moe" if architecture == "vit_moe" else "the model"
        raise CheckpointError(f"{where}: wrong arguments of {made_by} ({error})") from error


def _unwrapped(model: nn.Module, sharded: bool) -> nn.Module:
    """Removes the wrappers around a model."""
    while True:
        kinds = {kind.__name__ for kind in type(model).__mro__}
        if sharded and "FullyShardedDataParallel" in kinds:
            raise CheckpointError(
                "save_pretrained: model is sharded by FullyShardedDataParallel, wanted state_dict=model.state_dict(), "
                "called within FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT)"
            )
        # A compiled model also has the attributes of the model that it wraps, so look for _orig_mod first.
        inner = getattr(model, "_orig_mod", None) or getattr(model, "_fsdp_wrapped_module", None)
        inner = inner or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    if sharded and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise CheckpointError(
            "save_pretrained: model is partitioned by DeepSpeed ZeRO-3, wanted "
            "state_dict=engine._zero3_consolidated_16bit_state_dict()"
        )
    return model


def _describe(model: nn.Module, model_args: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
    """Describes how the model was made."""
    config = getattr(model, "moe_config", None)
    if isinstance(config, dict):
        if model_args:
            raise CheckpointError("save_pretrained: model_args are for a model of timm, and vit_moe made this model")
        return "vit_moe", {**config, **_changed_since(model)}
    if not any("upcycled" in module.__dict__ for module in model.modules()):
        raise CheckpointError(
            f"save_pretrained: {type(model).__name__} has no moe_config, wanted a model that vit_moe made or upcycle "
            "changed, or torch's wrapper around one"
        )
    return "upcycled", upcycled.describe(model, model_args)


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
        raise CheckpointError("\n  ".join([f"{problem}, differences ({len(differences)}):", *differences]))


def _changed_since(model: Any) -> dict[str, Any]:
    """Reads the arguments that timm's methods may have changed since the model was made."""
    sizes = {name: getattr(model.patch_embed, name) for name in ("img_size", "patch_size")}
    return {
        **{name: side if side == other else (side, other) for name, (side, other) in sizes.items()},
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
    }


def _compare_structure(made: nn.Module, model: nn.Module) -> None:
    """Refuses a model whose modules differ from the modules that its description makes."""
    ours, wanted = upcycled.structure(model), upcycled.structure(made)
    for name in ours.keys() | wanted.keys():
        if ours.get(name) != wanted.get(name):
            raise CheckpointError(
                f"save_pretrained: {name or 'the model'} is {ours.get(name, 'missing')}, and from_pretrained would "
                f"make {wanted.get(name, 'none')}; for a model of timm, pass the arguments of "
                "create_model as model_args"
            )


def _compare_routing(made: nn.Module, model: nn.Module) -> None:
    """Refuses a model with a MoE layer whose options were changed after construction, such as the capacity factor."""
    ours, wanted = ({upcycled.clean(name): m for name, m in part.named_modules()} for part in (model, made))
    for layer in (name for name, module in wanted.items() if isinstance(module, MoEMlp)):
        for name in (layer, f"{layer}.router"):
            if name not in ours:  # an unknown wrapper
                continue
            for option, made_value in _options(wanted[name]).items():
                value = getattr(ours[name], option, None)
                if value != made_value:
                    raise CheckpointError(
                        f"save_pretrained: {name} has {option} {value!r}, and from_pretrained would make "
                        f"{made_value!r}; make the model with this option, or save model.state_dict()"
                    )


def _options(module: nn.Module) -> dict[str, Any]:
    """Reads the options of a layer or router, which are public attributes with plain values."""
    kinds = (bool, int, float, str, dict, Softmax, Sinkhorn, SparsityConstrained)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, kinds) and name != "training" and not name.startswith("_")
    }


def _gather(found: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Copies the tensors to the CPU, unsharded. Returns None in a process that writes nothing.

    Every process gathers every sharded tensor, because gathering is collective. Only the first one keeps the result.
    """
    sharded = any(hasattr(tensor, "full_tensor") for tensor in found.values())
    writes = not sharded or torch.distributed.get_rank() == 0
    tensors = {}
    for name, tensor in found.items():
        whole: Any = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
        if type(whole) not in (Tensor, nn.Parameter):
            raise CheckpointError(f"save_pretrained: {name} is a {type(whole).__name__}, wanted a plain tensor")
        if writes:
            tensors[name] = whole.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return tensors if writes else None


def _unknown_to_json(config: dict[str, Any]) -> str:
    """Finds the arguments that JSON cannot represent, such as a function that makes a router."""
    found = []
    for name, value in config.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            found.append(f"{name} = {getattr(value, '__name__', value)}")
    return ", ".join(found)
