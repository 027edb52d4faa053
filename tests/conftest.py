"""Fixtures of the whole suite: one seed for every test, and the devices an op has kernels for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import vmoe_routers


def _devices(op: str | None) -> list[str]:
    """The CPU; CUDA where there is a GPU and, for a test module with an ``OP``, its kernel.

    An ``OP`` that the dispatcher does not know is made of torch's own ops and runs wherever they do.
    """
    if not torch.cuda.is_available():
        return ["cpu"]
    return ["cpu"] if op in vmoe_routers.ops.WITHOUT_CUDA else ["cpu", "cuda"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices(getattr(metafunc.module, "OP", None)))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that threads only wait for each other, on a busy machine for long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
