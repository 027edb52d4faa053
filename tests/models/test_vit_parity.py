"""Whole ViT-MoE models against the reference code's numbers (tests/golden)."""

import parity
import pytest


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("file", [file for file in parity.FILES if file.startswith("vit_")])
def test_parity(file, device):
    parity.check(file, device)
