"""Compares outputs and gradients of every variant with ours, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.case import BACKWARD, FORWARD, RECORDED, Case, Variant


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Draws a fixed gradient for every output, independent of the global seed, which the inputs of cases use."""
    made = []
    for output in outputs:
        generator = torch.Generator(output.device).manual_seed(1 + len(made))
        made.append(torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device))
    return made


def differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    return [output for output in outputs if output.requires_grad]


def applies(variant: Variant, direction: str) -> bool:
    """Tells whether the variant has this direction. Without leaves it has no gradient."""
    return direction == FORWARD or bool(variant.leaves)


def recording(direction: str) -> torch.set_grad_enabled:
    """Returns the grad mode of a direction.

    Enter the mode outside the timed loop, because entering takes as long as a small call.
    """
    return torch.set_grad_enabled(direction != FORWARD)


def runner(variant: Variant, direction: str) -> Callable[[], Sequence[Tensor]]:
    """Returns the function that is timed within `recording`: the call, or the call and its gradients."""
    if direction in (FORWARD, RECORDED):
        return variant.call
    # Each variant gets gradients in the shape of its own outputs.
    grad = cotangents(differentiable(variant.call()))

    def both():
        return torch.autograd.grad(differentiable(variant.call()), variant.leaves, grad)

    return both


def mismatch(a: Tensor, b: Tensor, tolerance: float) -> float:
    """Returns the share of entries that differ: integers by any amount, floats by more than tolerance * max |b|."""
    if a.shape != b.shape:
        raise AssertionError(f"shape {list(a.shape)}, ours has {list(b.shape)}")
    if not b.is_floating_point():
        return (a.long() != b.long()).double().mean().item()
    scale = b.abs().amax().clamp(min=1e-30) if b.numel() else 1.0
    return (~((a - b).abs() <= tolerance * scale)).double().mean().item()


def check(case: Case, variant: Variant, direction: str) -> None:
    """Compares the results of `variant` with ours, unless it is marked as different.

    Raises:
        AssertionError: More than `case.allowed` of the entries of a result differ.
    """
    if variant.different or (direction == BACKWARD and variant.different_gradient):
        return
    results = []
    for one in (variant, case.variants[0]):
        outputs = list(one.canonical(one.call()))
        if direction == BACKWARD:
            grad = cotangents(differentiable(outputs))
            outputs = list(one.canonical_gradients(torch.autograd.grad(differentiable(outputs), one.leaves, grad)))
        results.append([output.detach() for output in outputs])
    if len(results[0]) != len(results[1]):
        raise AssertionError(f"{variant.name}: {len(results[0])} results, ours has {len(results[1])}")
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        share = mismatch(a, b, case.tolerance)
        if not share <= case.allowed:
            raise AssertionError(
                f"{case.title}, {direction}, {variant.name}: {100 * share:.3g} % of the entries of result {i} differ "
                f"from ours by more than {case.tolerance:g} of the largest (allowed {100 * case.allowed:g} %)"
            )
