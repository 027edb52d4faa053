"""Tolerances and checks that the tests of all ops share.

1. ``check_reference``   values and gradients against the float64 reference, on the same rounded inputs
2. ``check_gradient``    torch.autograd.gradcheck in float64; second derivatives are right or raise
3. ``check_dispatcher``  torch.library.opcheck
4. edge cases            in the test module of the op
5. ``refused``           a ValueError or TypeError that begins with the op and names the argument
6. ``check_compile``     torch.compile(fullgraph=True), forward and backward
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

# Tolerances of all ops. Results in a 16-bit dtype are computed in float32 and rounded once. The relative error of this
# rounding is at most half a unit in the last place: 2**-8 in bfloat16, 2**-11 in float16. `rtol` is this bound.
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-5},
    torch.float16: {"rtol": 2**-11, "atol": 1e-5},
}
DTYPES = list(TOLERANCE)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))

INF, NAN = float("inf"), float("nan")
Result = Any  # a tensor or a tuple of tensors


def assert_close(actual: Tensor, expected: Tensor, *, slack: float = 1.0, dtype: torch.dtype | None = None) -> None:
    """Compare within the tolerance of ``dtype`` (default: the dtype of ``actual``), times ``slack``."""
    tolerance = {name: slack * value for name, value in TOLERANCE[dtype or actual.dtype].items()}
    torch.testing.assert_close(
        actual.detach().double().cpu(),
        expected.detach().double().cpu(),
        equal_nan=True,
        **tolerance,
    )


def spread(*shape: int, scale: float = 3.0) -> Tensor:
    """Return logits with the spread of a trained router: gates of one token differ by factors of about e^15."""
    return torch.randn(shape, dtype=torch.float64) * scale


def tied(*shape: int, levels: int = 3) -> Tensor:
    """Return values with many ties. Every dtype represents these values exactly."""
    return torch.randint(levels, shape).double() - 1


def rounded(inputs: Sequence[Any], dtype: torch.dtype, device: str) -> list[Any]:
    """Copy the inputs to ``device``. Floating-point tensors get ``dtype`` and are leaves that require grad."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if not x.is_floating_point():
            return x.to(device)
        return x.detach().to(device, dtype).requires_grad_()

    return [one(x) for x in inputs]


def tensors(result: Result) -> list[Tensor]:
    return list(result) if isinstance(result, tuple) else [result]


def check_reference(
    op: Callable[..., Result],
    reference: Callable[..., Result],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    device: str,
    *,
    slack: float = 1.0,
    gradient_slack: float = 1.0,
    **options: Any,
) -> None:
    """Compare values and gradients of ``op`` with ``reference`` in float64, on the same rounded inputs.

    Integers must be equal. A gradient may differ by ``gradient_slack`` times the tolerance. If the gradient's largest
    entry exceeds 1, the absolute part of the tolerance is relative to this entry.
    """
    ours = rounded(inputs, dtype, device)
    exact = [x.detach().cpu() if isinstance(x, Tensor) else x for x in ours]
    exact = rounded(exact, torch.float64, "cpu")
    mask = options.get("mask")
    ours_options = options if mask is None else {**options, "mask": mask.to(device)}
    actual, expected = tensors(op(*ours, **ours_options)), tensors(reference(*exact, **options))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.device.type == device
        if e.is_floating_point():
            assert a.dtype == dtype
            assert_close(a, e, slack=slack)
        else:
            assert a.dtype == e.dtype
            assert torch.equal(a.cpu(), e)

    # Both get the same cotangents, rounded to the op's dtype.
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if e.requires_grad]
    if not pairs:
        assert not any(a.requires_grad for a in actual)
        return
    cotangents = [torch.randn(a.shape, dtype=torch.float64).to(dtype) for a, _ in pairs]
    leaves = [(o, e) for o, e in zip(ours, exact, strict=True) if isinstance(o, Tensor) and o.requires_grad]
    ours_grads = torch.autograd.grad(
        [a for a, _ in pairs],
        [o for o, _ in leaves],
        [c.to(device) for c in cotangents],
        allow_unused=True,
    )
    exact_grads = torch.autograd.grad(
        [e for _, e in pairs],
        [e for _, e in leaves],
        [c.double() for c in cotangents],
        allow_unused=True,
    )
    for (leaf, _), o, e in zip(leaves, ours_grads, exact_grads, strict=True):
        assert (o is None) == (e is None)
        if o is None:
            continue
        assert o.dtype == leaf.dtype
        assert o.shape == leaf.shape
        size = max(1.0, e.abs().max().item()) if e.numel() else 1.0
        assert_close(o.double() / size, e / size, slack=gradient_slack, dtype=dtype)


def check_gradient(op: Callable[..., Result], inputs: Sequence[Any], device: str = "cpu", **options: Any) -> None:
    """Run gradcheck, and check that a second derivative is right or raises, and is never silently cut off."""
    inputs = rounded(inputs, torch.float64, device)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(y for y in tensors(op(*arguments, **options)) if y.requires_grad)

    assert torch.autograd.gradcheck(call, inputs)

    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    outputs = call(*inputs)
    cotangents = [torch.randn_like(y, requires_grad=True) for y in outputs]
    try:
        grads = torch.autograd.grad(outputs, leaves, cotangents, create_graph=True)
        # Every gradient depends at least on the cotangents. A gradient that does not require grad has lost its graph.
        assert all(g.requires_grad for g in grads)
        torch.autograd.grad([g.sum() for g in grads], cotangents)
    except (RuntimeError, NotImplementedError) as error:
        assert "derivative" in str(error) or "differentiable" in str(error), error
        return
    assert torch.autograd.gradgradcheck(call, inputs)


def check_dispatcher(overload: Any, arguments: Sequence[Any]) -> None:
    """Run opcheck on torch.ops.vmoe_routers.<op>.default: schema, fake kernel, autograd, compile."""
    with warnings.catch_warnings():
        # opcheck itself reads .grad of tensors that it derives from the arguments.
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        torch.library.opcheck(overload, tuple(arguments))


def check_compile(op: Callable[..., Result], inputs: Sequence[Any], device: str, **options: Any) -> None:
    """Check that torch.compile in one graph gives the values and gradients of eager mode."""

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(tensors(op(*arguments, **options)))

    torch._dynamo.reset()
    eager, compiled = rounded(inputs, torch.float32, device), rounded(inputs, torch.float32, device)
    expected = call(*eager)
    actual = torch.compile(call, fullgraph=True, backend="aot_eager")(*compiled)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e)
    if not any(e.requires_grad for e in expected):
        return
    for results in (actual, expected):
        sum(y.square().sum() for y in results if y.requires_grad).backward()
    for c, e in zip(compiled, eager, strict=True):
        if isinstance(e, Tensor) and e.requires_grad:
            torch.testing.assert_close(c.grad, e.grad)


def with_threads(run: Callable[[], Sequence[Tensor]]) -> list[Sequence[Tensor]]:
    """Return the results of `run` with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(threads)
    return results


def refused(op: str, argument: str) -> Any:
    """Expect a ValueError or TypeError whose message begins with the op's name and contains the argument's name."""
    return pytest.raises((ValueError, TypeError), match=rf"(?s)^{op}\b.*\b{argument}\b")


def strided(x: Tensor) -> Tensor:
    """Return the values of ``x`` in a tensor without a contiguous axis."""
    wide = x.new_empty([2 * size for size in x.shape])
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)
