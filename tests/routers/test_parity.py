"""Every router, MoE layer, loss and plan against the reference code's numbers (tests/golden)."""

import parity
import pytest


@pytest.mark.parametrize("file", [file for file in parity.FILES if not file.startswith("vit_")])
def test_parity(file):
    parity.check(file)
