"""first_not_finite: names the place in a model where NaN or infinity appears first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor, device: str, dtype: torch.dtype | None = None) -> str:
    """Runs a forward and describes the first module or parameter whose values are not finite.

    Args:
        model: The model. Its mode does not change.
        images: A batch.
        device, dtype: Device type and dtype of the autocast. With dtype None there is no autocast.
    """
    if not _finite(images):
        return "the images have values that are not finite"
    found: list[str] = []

    def hook(name: str):
        def check(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(map(_finite, _tensors(output))):
                found.append(f"the first module whose output is not finite is {name or 'the model'}")

        return check

    bad = next((name for name, parameter in model.named_parameters() if not _finite(parameter)), None)
    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.autocast(device, dtype) if dtype else nullcontext():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if bad is not None:
        found.insert(0, f"the first parameter that is not finite is {bad}")
    return found[0] if found else "parameters and outputs are finite, so the gradient overflows in the backward pass"


def _finite(x: Tensor) -> bool:
    x = x.to_local() if hasattr(x, "to_local") else x  # type: ignore[operator]
    return bool(torch.isfinite(x).all())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
