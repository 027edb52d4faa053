"""What autograd keeps, and what a process that does the work once needs."""

import sys

import pytest
import torch

from benchmarks.case import BACKWARD, Variant
from benchmarks.memory import peak_in_child, saved_bytes


def test_saved_bytes_counts_a_storage_once_and_no_leaf():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(Variant("exp", "index", lambda: [x.exp()], (x,))) == 400
    assert saved_bytes(Variant("square", "index", lambda: [x * x], (x,))) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_in_a_child_is_that_of_the_graph():
    size = {"images": 32, "experts": 32}
    peak = peak_in_child("sinkhorn", 0, "log domain", size, 1, BACKWARD)
    # 20 iterations, two tensors [n, E] each, at the least.
    assert peak is not None and peak > 40 * 4 * 32 * 196 * 32
