"""Lower bounds of the memory that a study needs. A study that cannot fit is refused before a model is built."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, NamedTuple

from vmoe_routers.memory import available_memory, in_words
from vmoe_routers.models.vit import moe_block_indices
from vmoe_routers.options import OptionError
from vmoe_routers.study.own import is_own
from vmoe_routers.study.settings import MOST_BLOCKS, Settings
from vmoe_routers.study.variants import Variant

_FLOAT = 4
_SIZES = ("image_size", "patch_size", "width", "mlp_ratio", "depth", "heads", "num_experts", "batch_size")
_SIZES += ("group_size", "top_k", "capacity_factors")
_BLOCK = 20_000  # bytes of a block's Python objects
_PROCESS = 100 << 20  # bytes that a process with torch does not share with other processes


class Need(NamedTuple):
    """Lower bounds of the bytes for training one model. With lower bounds, no study that fits is refused."""

    parameters: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of parameters, optimizer and activations."""
        return sum(self)


def check_memory(
    settings: Settings,
    variants: Sequence[Variant],
    of_ablations: Sequence[Variant],
    size: int,
    channels: int = 1,
    classes: int = 2,
    images: int = 0,
) -> int:
    """Returns the number of workers: `settings.workers`, or, if this is 0, one per core or fewer if memory is short.

    Args:
        settings: The study's settings.
        variants: The study's models, which are timed together.
        of_ablations: The models of the ablations.
        size, channels, classes: Height, channels and classes of the images.
        images: Bytes of all images. Every worker holds a copy.

    Raises:
        OptionError: One model, all models during the timing, or all workers together do not fit. The error names the
            option that costs most.
    """
    shape, available = (size, channels, classes), available_memory(settings.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = settings.workers or (cores if settings.device == "cpu" else 1)
    if available is None:
        return wanted
    needs = {
        variant: _need(_options(variant.settings(settings)), variant, shape) for variant in [*variants, *of_ablations]
    }
    largest = max(needs, key=lambda variant: needs[variant].total)
    need = needs[largest]
    if need.total > available:
        name, value = _culprit(settings, variants, shape)
        raise OptionError(
            f"{name} {value}: {largest.label} needs at least {in_words(need.total)} "
            f"(parameters {in_words(need.parameters)}, gradients and optimizer {in_words(need.optimizer)}, "
            f"activations {in_words(need.activations)}), {in_words(available)} are available",
            name,
        )
    # The timing holds all models in one process.
    together = sum(sum(_need(_options(settings), variant, shape)[:2]) for variant in variants) + need.activations
    if together > available:
        name, value = _culprit(settings, variants, shape)
        raise OptionError(
            f"{name} {value}: timing all {len(variants)} models in turns needs at least "
            f"{in_words(together)}, {in_words(available)} are available",
            name,
        )
    each = need.total + (_PROCESS + images if settings.device == "cpu" else 0)
    if settings.workers and settings.workers * each > available:
        raise OptionError(
            f"workers {settings.workers}: each needs at least {in_words(each)}, {in_words(available)} are available",
            "workers",
        )
    return max(1, min(wanted, int(available // each)))


def _options(settings: Settings) -> dict[str, Any]:
    """Returns the settings by name, and the share of the blocks that has a MoE layer."""
    depth = min(settings.depth, MOST_BLOCKS)
    share = len(moe_block_indices(depth, settings.moe_blocks)) / depth
    return vars(settings) | {"moe_share": share}


def _need(options: dict[str, Any], variant: Variant, shape: tuple[int, int, int]) -> Need:
    """Computes the memory that a variant needs, in floating point because sizes may be huge."""
    o, (size, channels, classes) = SimpleNamespace(**options), shape
    width, depth, experts, batch = float(o.width), float(o.depth), float(o.num_experts), float(o.batch_size)
    hidden = width * o.mlp_ratio
    tokens = float(max(size // o.patch_size, 1)) ** 2  # per image
    moe = 0.0 if variant.router is None else depth * o.moe_share
    group = tokens if variant.has_phi else tokens * o.group_size
    slots = 0.0  # per group; 0 is a lower bound for own routers, whose slots are not known yet
    if variant.capacity_factor is not None:
        capacity = group * (variant.top_k or 1) * variant.capacity_factor / experts
        if not variant.has_phi:  # an expert takes a token at most once
            capacity = min(capacity, group)
        slots = experts * max(capacity, 1.0)
    parameters = depth * 4 * width**2 + (depth - moe) * 2 * width * hidden
    parameters += moe * experts * 2 * width * hidden
    if not is_own(variant.router):
        parameters += moe * width * (slots if variant.has_phi else experts)
    parameters += width * (tokens + channels * o.patch_size**2 + classes)
    # The backward pass needs the inputs of both norms and of the projections, the attention weights and the hidden
    # layers.
    activations = depth * batch * (tokens * 6 * width + o.heads * tokens**2) + (depth - moe) * batch * tokens * hidden
    activations += moe * batch * tokens / group * slots * (width + hidden)
    if variant.has_phi:
        activations += moe * batch * tokens * slots
    return Need(_FLOAT * parameters + depth * _BLOCK, 3 * _FLOAT * parameters, _FLOAT * activations)


def _culprit(settings: Settings, variants: Sequence[Variant], shape: tuple[int, int, int]) -> tuple[str, Any]:
    """Finds the option that saves the most memory if it is reset to its default. Returns its name and value."""
    defaults = {field.name: field.default for field in fields(Settings)}

    def total_without(name: str) -> float:
        options = _options(settings) | {name: defaults[name]}
        found = variants
        if name == "capacity_factors":
            found = [replace(variant, capacity_factor=variant.capacity_factor and 1.0) for variant in variants]
        elif name == "top_k":
            found = [replace(variant, top_k=variant.top_k and 1) for variant in variants]
        small = (min(shape[0], 8), *shape[1:])
        return max(_need(options, variant, small if name == "image_size" else shape).total for variant in found)

    name = min(_SIZES, key=total_without)
    return name, shape[0] if name == "image_size" else getattr(settings, name)
