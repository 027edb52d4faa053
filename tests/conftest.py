"""Fixtures of all tests: a seed before every test, and the devices of this machine.

With --cuda-on-host LIBRARY, which `make test` builds, CPU tensors go to the CUDA kernels and their bindings, which run
on the host in an emulator (tests/cpp/cuda/shim). The CUDA kernels must pass the same tests.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import vmoe_routers
from vmoe_routers.ops import _dtypes

# The files that take longest. They start first, so that no process of pytest-xdist works alone at the end.
SLOW = [
    "training/test_processes.py",
    "test_notebooks.py",
    "models/test_compilers.py",
    "test_cli.py",
    "training/test_safety.py",
    "training/test_train.py",
    "models/test_onnx.py",
    "test_aux_loss.py",
    "ops/test_decompositions.py",
    "ops/test_hostile.py",
    "test_moe.py",
    "study/test_report.py",
    "study/test_study.py",
    "study/test_own.py",
    "distributed/test_blocks.py",
    "distributed/test_layouts.py",
    "distributed/test_state.py",
    "distributed/test_page.py",
    "benchmarks/test_gpu.py",
    "benchmarks/test_run.py",
    "benchmarks/test_memory.py",
    "test_readme.py",
    "test_examples.py",
    "test_packaging.py",
]
DEVICES = ["cpu", "cuda"] if vmoe_routers._C.cuda_built and torch.cuda.is_available() else ["cpu"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda-on-host", metavar="LIBRARY", help="the CUDA kernels and bindings, built for the host")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_kernels: skipped with --cuda-on-host: needs the CPU kernels, or no kernel")
    workers = os.environ.get("PYTEST_XDIST_WORKER_COUNT")
    if workers:
        # Divide the cores among the processes of pytest-xdist, and among the processes that a test starts.
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    library = config.getoption("--cuda-on-host")
    if library:
        torch.ops.load_library(library)
        _dtypes.HALF_PRODUCTS = frozenset({"cpu", "cuda"})


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        order = {f"tests/{name}": at for at, name in enumerate(SLOW)}
        items.sort(key=lambda item: order.get(item.location[0], len(SLOW)))
    if config.getoption("--cuda-on-host"):
        for item in items:
            if item.get_closest_marker("cpu_kernels"):
                item.add_marker(pytest.mark.skip(reason="needs the CPU kernels, or no kernel"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print every reason for which tests were skipped; .ci/run prints these lines again at its end."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.getreports("skipped"))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"skipped {count}: {reason.removeprefix('Skipped: ')}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture
def on_device(device: str) -> Iterator[None]:
    """Make `device` the default device of the test."""
    with nullcontext() if device == "cpu" else torch.device(device):
        yield


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Exclude all objects so far from garbage collection: a collection of a million old objects takes seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run the test on one thread, because the threads of small models mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory):
    """A mesh of one process on the CPU, with a process group that ends after the module's tests."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()
