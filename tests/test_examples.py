"""Every file in examples/ runs. tests/compat and tests/distributed run files that need more packages or ranks."""

import runpy
from pathlib import Path

import pytest
import torch

import vmoe_routers as vr

EXAMPLES = [
    path
    for path in sorted((Path(__file__).parents[1] / "examples").glob("*.py"))
    if path.stem not in ("train_accelerate", "train_distributed", "train_lightning", "train_peft", "train_trainer")
]


def run(path, monkeypatch):
    """Runs a file. Returns the variables of the file, and the gradient of each auxiliary loss."""
    gradients, aux_loss = [], vr.aux_loss

    def watched(model):
        value = aux_loss(model)
        if value.requires_grad:
            value.register_hook(lambda gradient: gradients.append(float(gradient)))
        return value

    monkeypatch.setattr(vr, "aux_loss", watched)
    variables = runpy.run_path(str(path), run_name="__main__")
    return variables, gradients


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path, capsys, monkeypatch, one_thread):
    if path.stem == "serve_onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    variables, gradients = run(path, monkeypatch)
    assert capsys.readouterr().out
    if path.stem == "serve_onnx":
        assert variables["logits"].shape == (7, 10) and variables["difference"] < 1e-4
    if path.stem.startswith("train"):
        assert variables["accuracy"] > 0.2
        assert gradients == [1.0] * {"train_plain": 40, "train_timm": 60}[path.stem]


def test_an_own_router_takes_30_lines_at_most():
    (path,) = [path for path in EXAMPLES if path.stem == "own_router"]
    source = path.read_text().split("class HashRouter")[1].split("if __name__")[0]
    assert len(source.strip().splitlines()) <= 30


def test_own_router_and_experts_train_in_a_vit():
    pytest.importorskip("timm")
    from vmoe_routers.models import cost, vit_moe

    router = runpy.run_path(str(next(path for path in EXAMPLES if path.stem == "own_router")))["HashRouter"]
    model = vit_moe(8, 4, embed_dim=16, depth=2, num_heads=2, num_classes=3, router=router, num_experts=2)
    assert type(model.blocks[1].mlp.router).__name__ == "HashRouter"
    assert cost(model)["slots"] == 8
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert vr.aux_loss(model) == 0
