"""Large results are in huge pages if Linux provides them on request (csrc/torch/huge_pages.h)."""

from mmap import mmap
from pathlib import Path

import pytest
import torch

from vmoe_routers import ops

pytestmark = [
    pytest.mark.cpu_kernels,
    pytest.mark.skipif(
        not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="this system has no transparent huge pages"
    ),
]


def advised(address: int) -> bool:
    """Tells whether huge pages were requested for the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if head == "VmFlags:":
            if inside:
                return "hg" in line.split()
        elif not head.endswith(":"):
            begin, end = (int(part, 16) for part in head.split("-"))
            inside = begin <= address < end
    raise AssertionError(f"no mapping holds {address:#x}")


def test_a_large_result_asks_for_huge_pages():
    token = torch.arange(8192, dtype=torch.int32).view(1, 2, 4096)
    x = torch.randn(1, 8192, 512)
    result = ops.dispatch(x, token, *ops.invert_slots(token, 8192)[:2])
    assert result.nbytes == 16 << 20
    assert advised(result.data_ptr() + (8 << 20))
    # Map memory without a request for huge pages. A small tensor would not do: it may be in a heap that was part of an
    # earlier large result.
    with_small_pages = torch.frombuffer(mmap(-1, 16 << 20), dtype=torch.uint8)
    assert not advised(with_small_pages.data_ptr() + (8 << 20))
