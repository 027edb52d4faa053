"""The examples that need a package of the extra compat run, and minimise a loss that includes the auxiliary loss."""

from pathlib import Path

import pytest
import torch
from test_examples import run

import vmoe_routers as vr

FOLDER = Path(__file__).parents[2] / "examples"

# Warnings of these packages about torch and about each other.
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(("name", "package", "gradients"), [
    ("train_accelerate", "accelerate", [0.5] * 80),  # a step accumulates two batches
    ("train_lightning", "lightning", [0.5] * 80),
    ("train_trainer", "accelerate", [0.5] * 80),
    ("train_peft", "peft", [1.0] * 40),
])  # fmt: skip
def test_example_runs(name, package, gradients, monkeypatch):
    pytest.importorskip(package, reason=f"needs {package}: make compat")
    if name in ("train_trainer", "train_peft"):
        pytest.importorskip("transformers", "5.10", reason="needs transformers 5.10: make compat")
    variables, found = run(FOLDER / f"{name}.py", monkeypatch)
    assert variables["accuracy"] > 0.2
    assert found == gradients
    assert vr.aux_loss(variables["model"]) == 0
    if name == "train_peft":
        trained = {name: p for name, p in variables["model"].named_parameters() if p.requires_grad}
        for part in ("q_proj.lora_B", "experts.lora_B", "logits", "classifier"):
            assert any(part in name for name in trained), part
        assert all(torch.count_nonzero(p) for name, p in trained.items() if "lora_B" in name)
