"""Profiles of hypothesis. "quick", the default, has the same few examples in every run.

"emulator", the default with --cuda-on-host, has fewer, because the emulator of CUDA is slow. "minutes" has random
examples for minutes, and "long" for hours:

pytest tests/properties --hypothesis-profile=long -n 8
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", max_examples=40, derandomize=True, **COMMON)
settings.register_profile("emulator", max_examples=10, derandomize=True, **COMMON)
settings.register_profile("minutes", max_examples=1_000, print_blob=True, **COMMON)
settings.register_profile("long", max_examples=50_000, print_blob=True, **COMMON)


def pytest_pycollect_makemodule(parent: pytest.Collector) -> None:
    """Load the profile that the options choose, before a module is imported: `given` keeps the profile."""
    default = "emulator" if parent.config.getoption("--cuda-on-host") else "quick"
    settings.load_profile(parent.config.getoption("--hypothesis-profile") or default)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Run the tests on one thread: their tensors are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
