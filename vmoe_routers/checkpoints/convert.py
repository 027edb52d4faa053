"""convert: a checkpoint of the reference code into a folder that `from_pretrained` loads."""

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
        source: P of a V-MoE checkpoint (P.index, P.data-00000-of-0000N), or an npz file.
        folder: where config.json and model.safetensors go.
        router: the router of the MoE layers, which parameters alone do not tell; by default softmax_token_choice, or
            soft where there are slots. Dense models have none.
        top_k: experts per token, with Token Choice.
        capacity_factor: by default the router's own.
        group_size: images that are routed together.
        img_size: side of the images in pixels, for which the position embeddings are resized; by default what the
            checkpoint's were for.
        progress: called with the bytes that are read and those that there are to read.

    Returns:
        the model.

    Raises:
        CheckpointError: a file that cannot be read, or an architecture that `vit_moe` does not have.
        ValueError: parameters that do not match, or an argument out of range.
    """
    is_npz = os.path.isfile(source)
    arrays = read_npz(source, progress=progress) if is_npz else read_vmoe(source, progress=progress)
    if any(path.startswith("params/") for path in arrays):  # beside it is the rest of a training state
        arrays = {path.removeprefix("params/"): a for path, a in arrays.items() if path.startswith("params/")}
    arrays = {reference_path(path): array for path, array in arrays.items()}
    try:
        arguments = infer_arguments(arrays, img_size)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None
    options: dict[str, Any] = {}
    if arguments["router"] is not None:
        arguments["router"] = router or arguments["router"]
        options = {"group_size": group_size, "capacity_factor": capacity_factor}
        if "token_choice" in arguments["router"]:
            options["top_k"] = top_k
        options = {name: value for name, value in options.items() if value is not None}
    elif router is not None:
        raise CheckpointError(f"{source}: a dense model, which has no router {router!r}")
    from vmoe_routers.models import vit_moe

    # Without memory first, which a few shapes beyond belief could exhaust
    load_flax(make_empty({**arguments, **options}, source), arrays)
    with torch.random.fork_rng(devices=[]):  # what is drawn is written over
        model = vit_moe(**arguments, **options)
    load_flax(model, arrays).eval()
    save_pretrained(model, Path(folder))
    return model


def infer_arguments(arrays: Mapping[str, Tensor], img_size: int | None = None) -> dict[str, Any]:
    """The arguments of `vit_moe` that these parameters, by the reference's paths, tell; `load_flax` checks the rest.

    Raises CheckpointError for what is no ViT-MoE, or not of one form throughout.
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
        raise CheckpointError(f"blocks {sorted(blocks)[:20]}, wanted encoderblock_0 and those that follow")
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
            raise CheckpointError(f"position embeddings of {tokens} patches, which are of no square; give img_size")
        arguments["img_size"] = img_size or side * height
    elif img_size is None:
        raise CheckpointError("no position embeddings, which would tell the size of the images; give img_size")
    else:
        arguments |= {"img_size": img_size, "pos_embed": "sincos"}
    return arguments


def _ratio(hidden: int, width: int) -> float:
    """mlp_ratio, of which int(width * mlp_ratio) is the hidden width to the last unit."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
