"""Draws the pictures of docs/inspect.md: the photograph, tokens and weights of scripts/six_routers.py, in MoE layers.

python scripts/inspect_pictures.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from six_routers import EXPERTS, patches_of, tokens_of, weights_of
from sklearn.datasets import load_sample_image
from torch import nn

import vmoe_routers as vr

DOCS = Path(__file__).parents[1] / "docs"
LAYERS = {
    "Softmax Token Choice": {"router": "softmax_token_choice", "capacity_factor": 0.8},
    "Sparse Expert Choice": {"router": "sparsity_constrained_expert_choice"},
    "Soft MoE": {"router": "soft", "scale_init": 20.0},
}


@torch.no_grad()
def draw(folder: Path) -> None:
    """Writes the pictures inspect_<name>.png. Each picture shows few layers, to fit on small screens."""
    torch.manual_seed(0)
    photo = torch.tensor(load_sample_image("china.jpg"))[4:420, :640] / 255
    tokens = tokens_of(patches_of(photo))
    weight = weights_of(tokens)
    model = nn.ModuleDict()
    for name, options in LAYERS.items():
        layer = model[name] = vr.MoEMlp(tokens.shape[-1], num_experts=EXPERTS, **options).eval()
        if options["router"] == "soft":
            layer.router.phi.copy_(weight.T.unsqueeze(-1))
        else:
            layer.router.weight.copy_(2 * weight)
    with vr.inspect.record(model) as trace:
        for layer in model.values():
            layer(tokens)
    figures = {
        "tokens": trace.plot_tokens(photo, layers=[0]),
        "load": trace.plot_load([0, 2]),
        "plan": trace.plot_plan(1),
        "slots": trace.plot_slots(photo, layer=2),
    }
    for name, figure in figures.items():
        figure.savefig(folder / f"inspect_{name}.png", dpi=80)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS)
    draw(parser.parse_args().out)
