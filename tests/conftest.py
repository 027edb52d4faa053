"""Fixtures of the whole suite: one seed for every test, and the devices an op has kernels for."""

from __future__ import annotations

import pytest
import torch

import vmoe_routers  # noqa: F401  (registers the ops)


def _devices(op: str | None) -> list[str]:
    """The CPU; CUDA where there is a GPU and, for a test module with an ``OP``, its kernel."""
    if not torch.cuda.is_available():
        return ["cpu"]
    if op is None or torch._C._dispatch_has_kernel_for_dispatch_key(f"vmoe_routers::{op}", "CUDA"):
        return ["cpu", "cuda"]
    return ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices(getattr(metafunc.module, "OP", None)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
