"""Fixtures of the whole suite: one seed for every test, and the devices there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import vmoe_routers

DEVICES = ["cpu", "cuda"] if vmoe_routers._C.cuda_built and torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """What a test makes without naming a device is on `device`."""
    with nullcontext() if device == "cpu" else torch.device(device):
        yield


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
