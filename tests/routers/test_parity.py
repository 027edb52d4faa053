"""Every router, MoE layer, loss and plan against the reference code's numbers (tests/golden)."""

import parity
import pytest
import torch

import vmoe_routers as vr


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("file", [file for file in parity.FILES if not file.startswith("vit_")])
def test_parity(file, device):
    parity.check(file, device)


def test_every_router_is_compared_up_to_its_layer_and_gradients():
    layers = [d for file in parity.FILES if file.startswith("mlpmoe_") for d in parity.compare(file)]
    for router in vr.ROUTERS:
        assert {"layer y", "gradients (of norm)"} <= {d.quantity for d in layers if d.router == router}, router


def test_the_table_is_of_this_comparison():
    """docs/parity.md has the rows of the current comparison; its numbers may come from another machine."""

    def without_numbers(lines):
        return [line.split("|")[1:4] + line.split("|")[5:] for line in lines if line.startswith("| ")]

    written = parity.TABLE.read_text().splitlines()
    assert without_numbers(written) == without_numbers(parity.table()), f"make it anew: {parity.COMMAND}"


def test_the_comparison_sees_a_wrong_value(monkeypatch):
    golden = parity.Golden("tc_overflow_G1_K2_bpr1")
    golden["y"] = golden["y"] + 2e-5
    golden["indices"] = golden["indices"].clone()
    golden["indices"][0, 0, 0, 1] += 1
    monkeypatch.setattr(parity, "Golden", lambda file: golden)
    parity.compare.cache_clear()
    try:
        with pytest.raises(AssertionError, match=r"y: 2\.\d*e-05 > 1e-05; slots of the choices: 1 > 0"):
            parity.check("tc_overflow_G1_K2_bpr1")
    finally:
        parity.compare.cache_clear()


def test_nan_is_beyond_every_tolerance():
    nan = torch.tensor([torch.nan])
    for deviation in (parity.absolute, parity.relative, parity.of_norm, parity.of_largest):
        assert not deviation(nan, torch.ones(1)) <= 1e9
    assert parity.differing(nan, torch.ones(1)) == 1
