"""Memory: the bytes that autograd saves, and the peak of a process that runs a case once."""

import sys

import pytest
import torch

from benchmarks.case import BACKWARD, Size, Variant
from benchmarks.memory import peaks, saved_bytes


def test_saved_bytes_counts_a_storage_once_and_no_leaf():
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(Variant("exp", "index", lambda: [x.exp()], (x,))) == 400
    assert saved_bytes(Variant("square", "index", lambda: [x * x], (x,))) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peaks_are_those_of_the_graphs():
    found = peaks("sinkhorn", 0, Size(images=32, experts=32), 1)
    # Each of 20 iterations keeps at least two tensors [n, E].
    assert found[f"log domain, {BACKWARD}"] > 40 * 4 * 32 * 196 * 32
    assert found["ours, forward"] < found[f"log domain, {BACKWARD}"] / 10
