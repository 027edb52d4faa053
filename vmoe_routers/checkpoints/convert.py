"""convert: turns a checkpoint of the reference code into a folder that `from_pretrained` loads."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vmoe_routers.checkpoints._files import Progress
from vmoe_routers.checkpoints.error import CheckpointError
from vmoe_routers.checkpoints.flax import load_flax, reference_path
from vmoe_routers.checkpoints.npz import read_npz
from vmoe_routers.checkpoints.pretrained import make_empty, save_pretrained
from vmoe_routers.checkpoints.vmoe import read_vmoe
from vmoe_routers.memory import available_memory, in_words
from vmoe_routers.options import MAX_CAPACITY_FACTOR, OptionError, did_you_mean
from vmoe_routers.routers import ROUTERS, router_options


def convert(
    source: str,
    folder: str,
    router: str | None = None,
    top_k: int = 2,
    capacity_factor: float | None = None,
    group_size: int = 1,
    img_size: int | None = None,
    *,
    progress: Progress | None = None,
) -> Any:
    """Reads a V-MoE checkpoint or a dense ViT, infers its architecture, writes a folder for from_pretrained.

    Args:
        source: the prefix P of a V-MoE checkpoint (P.index, P.data-00000-of-0000N), or an npz file.
        folder: the folder for config.json and model.safetensors.
        router: the router of the MoE layers, which parameters do not determine. By default soft if the checkpoint has
            slots, else softmax_token_choice. A dense model has no router.
        top_k: experts per token, with Token Choice.
        capacity_factor: slots of all experts per token (Token Choice: times top_k), by default the router's own.
        group_size: images that are routed together.
        img_size: side of the images in pixels, by default of the checkpoint's images. Another side resizes the position
            embeddings.
        progress: called with the bytes read so far and the bytes to read in all.

    Returns:
        The model.

    Raises:
        CheckpointError: A file cannot be read, `vit_moe` does not have the architecture, or the parameters do not
            match the architecture.
        OptionError: An argument is out of range, or the images are too large for the memory.
    """
    _check_arguments(source, folder, router, top_k, capacity_factor, group_size, img_size)
    is_npz = os.path.isfile(source)
    arrays = read_npz(source, progress=progress) if is_npz else read_vmoe(source, progress=progress)
    if any(path.startswith("params/") for path in arrays):  # a training state, which also has other arrays
        arrays = {path.removeprefix("params/"): a for path, a in arrays.items() if path.startswith("params/")}
    arrays = {reference_path(path): array for path, array in arrays.items()}
    try:
        arguments = infer_arguments(arrays, img_size)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    sides = arguments["patch_size"]
    if img_size is not None and any(img_size % side for side in (sides if isinstance(sides, tuple) else (sides,))):
        raise OptionError(f"img_size {img_size} is not a multiple of the patch size {sides} of {source}", "img_size")
    options: dict[str, Any] = {}
    if arguments["router"] is not None:
        if top_k > arguments["num_experts"]:
            raise OptionError(f"top_k {top_k} is more than the {arguments['num_experts']} experts of {source}", "top_k")
        arguments["router"] = router or arguments["router"]
        options = {"group_size": group_size, "capacity_factor": capacity_factor}
        if "top_k" in router_options(arguments["router"]):
            options["top_k"] = top_k
        options = {name: value for name, value in options.items() if value is not None}
    elif router is not None:
        raise CheckpointError(f"{source}: a dense model has no router, got router {router!r}")
    from vmoe_routers.models import vit_moe

    # Build on the meta device first, because huge shapes in an untrusted file must not exhaust memory.
    empty = make_empty({**arguments, **options}, source)
    # Resizing makes two more copies of the position embeddings, in float64.
    wanted = sum(tensor.nbytes for tensor in empty.state_dict().values()) + 4 * empty.pos_embed.nbytes
    available = available_memory()
    if img_size is not None and available is not None and wanted > available:
        raise OptionError(
            f"img_size {img_size}: the model needs at least {in_words(wanted)}, {in_words(available)} are available",
            "img_size",
        )
    try:
        load_flax(empty, arrays)
        with torch.random.fork_rng(devices=[]):  # load_flax overwrites the drawn values
            model = vit_moe(**arguments, **options)
        load_flax(model, arrays).eval()
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from None
    save_pretrained(model, Path(folder))
    return model


def _check_arguments(
    source: str,
    folder: str,
    router: str | None,
    top_k: int,
    capacity_factor: float | None,
    group_size: int,
    img_size: int | None,
) -> None:
    for name, path in (("source", source), ("folder", folder)):
        if not os.fspath(path):
            raise OptionError(f"{name} must not be empty", name)
    if router is not None and router not in ROUTERS:
        meant = did_you_mean(router, ROUTERS)
        raise OptionError(f"router {router!r} does not exist; there are {', '.join(ROUTERS)}{meant}", "router")
    for name, value in (("top_k", top_k), ("group_size", group_size), ("img_size", img_size)):
        if value is not None and not 1 <= value < 1 << 31:
            raise OptionError(f"{name} must be at least 1 and below 2 ** 31, got {value}", name)
    if capacity_factor is not None and not 0 < capacity_factor <= MAX_CAPACITY_FACTOR:
        raise OptionError(
            f"capacity_factor must be positive and at most {MAX_CAPACITY_FACTOR:g}, got {capacity_factor}",
            "capacity_factor",
        )


def infer_arguments(arrays: Mapping[str, Tensor], img_size: int | None = None) -> dict[str, Any]:
    """Infers the arguments of `vit_moe` from parameters by the reference's paths. `load_flax` checks all shapes later.

    Raises:
        CheckpointError: The parameters do not belong to a vision transformer, or blocks are not numbered in order.
    """

    def shape(path: str, axes: int) -> tuple[int, ...]:
        if path not in arrays:
            raise CheckpointError(f"no {path}: not the parameters of a vision transformer")
        found = tuple(arrays[path].shape)
        if len(found) != axes or 0 in found:
            raise CheckpointError(f"{path} has shape {list(found)}, wanted {axes} axes")
        return found

    height, width, channels, embed_dim = shape("embedding/kernel", 4)
    blocks = {int(match[1]) for path in arrays if (match := re.match(r"Encoder/encoderblock_(\d{1,6})/", path))}
    if blocks != set(range(len(blocks))) or not blocks:
        raise CheckpointError(f"blocks {sorted(blocks)[:20]}, wanted consecutive blocks from encoderblock_0 on")
    moe = [i for i in sorted(blocks) if any(path.startswith(f"Encoder/encoderblock_{i}/Moe/") for path in arrays)]
    block = "Encoder/encoderblock_0/"
    hidden = shape(f"{block}Moe/Mlp/Dense_0/kernel", 3) if 0 in moe else shape(f"{block}Mlp/Dense_0/kernel", 2)
    arguments: dict[str, Any] = {
        "patch_size": height if height == width else (height, width),
        "in_chans": channels,
        "num_classes": shape("head/kernel", 2)[1] if "head/kernel" in arrays else 0,
        "embed_dim": embed_dim,
        "depth": len(blocks),
        "num_heads": shape(f"{block}SelfAttention/query/kernel", 3)[1],
        "mlp_ratio": _ratio(hidden[-1], embed_dim),
        "global_pool": "token" if "cls" in arrays else "map" if "MapHead/probe" in arrays else "avg",
        "qk_norm": f"{block}SelfAttention/query_ln/scale" in arrays,
        "pre_logits": "pre_logits/kernel" in arrays,
        "router": None,
    }
    if moe:
        path = f"Encoder/encoderblock_{moe[0]}/Moe/"
        arguments |= {"moe_blocks": moe, "num_experts": shape(f"{path}Mlp/Dense_0/kernel", 3)[0]}
        if f"{path}Router/mu" in arrays:
            arguments |= {"router": "soft", "slots_per_expert": shape(f"{path}Router/mu", 3)[2]}
        else:
            arguments |= {"router": "softmax_token_choice"}
    positions = "Encoder/posembed_input/pos_embedding"
    if positions in arrays:
        tokens = shape(positions, 3)[1] - ("cls" in arrays)
        side = math.isqrt(tokens)
        if img_size is None and (side * side != tokens or height != width):
            raise CheckpointError(f"position embeddings of {tokens} patches, which form no square; give img_size")
        arguments["img_size"] = img_size or side * height
    elif img_size is None:
        raise CheckpointError("no position embeddings, from which img_size could be inferred; give img_size")
    else:
        arguments |= {"img_size": img_size, "pos_embed": "sincos"}
    return arguments


def _ratio(hidden: int, width: int) -> float:
    """Returns the mlp_ratio for which int(width * mlp_ratio) is exactly the hidden width."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
