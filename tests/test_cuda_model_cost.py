"""scripts/cuda_model_cost.py: the prices of launches, and the table of a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import vmoe_routers as vr
from vmoe_routers.ops import _dtypes

spec = importlib.util.spec_from_file_location(
    "cuda_model_cost", Path(__file__).parents[1] / "scripts" / "cuda_model_cost.py"
)
assert spec and spec.loader
cost = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cost)


def test_a_launch_takes_the_largest_of_its_times():
    assert cost.Launch(bytes=4.3e9).seconds == pytest.approx(1e-3)
    assert cost.Launch(bytes=4.3e9, flops=1.4e12).seconds == pytest.approx(2e-3)
    assert cost.Launch(bytes=1.0, flops=1.0).seconds == cost.LAUNCH
    assert cost.Launch(bytes=1.0, estimate=1e-4).seconds == 1e-4


def test_lists_products_and_no_views():
    with cost.Listed() as listed:
        (torch.ones(3, 4).t().contiguous().t() @ torch.ones(4, 5)).view(15)
    assert [launch.flops for launch in listed.launches if launch.flops] == [2.0 * 3 * 4 * 5]
    assert len(listed.launches) == 4  # two fills, a copy, the product


def test_experts_have_the_operations_of_the_flop_counter():
    x, w1, w2 = torch.ones(2, 6, 4), torch.ones(2, 4, 16), torch.ones(2, 16, 4)
    with FlopCounterMode(display=False) as counter:
        vr.ops.grouped_mlp(x, w1, None, w2, None)
    assert sum(launch.flops for launch in cost.OURS["grouped_mlp"](x, w1)) == counter.get_total_flops()


def test_the_table_has_every_router(monkeypatch):
    monkeypatch.setattr(_dtypes, "HALF_PRODUCTS", _dtypes.HALF_PRODUCTS)  # restored after the test
    lines = cost.table(batch=2, img_size=32, embed_dim=48, depth=2, num_heads=2).split("\n")
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])}
    assert list(rows) == ["dense ViT", *vr.ROUTERS]
    assert rows["dense ViT"][:5:4] == ["3", "1.00"]
    assert all(int(row[0]) > 3 and int(row[5]) > int(row[0]) and float(row[9]) > 1 for row in list(rows.values())[1:])
