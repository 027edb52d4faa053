"""Draws docs/six_routers.png: one photograph, routed by the six routers.

    python scripts/six_routers.py

A patch of 16 x 16 pixels is a token. Its features are its mean colour, its contrast and its height in the picture.
Nothing is trained: the router weight of an expert is the centre of a cluster of tokens. Every router gets the same
tokens and weights, with one slot per token (Soft MoE: four slots per expert).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_sample_image
from torch import Tensor

import vmoe_routers as vr
from vmoe_routers.inspect.plots import colours

PAGE = Path(__file__).parents[1] / "docs" / "six_routers.png"
PATCH, EXPERTS = 16, 8
COLOURS = torch.tensor(colours(EXPERTS))
TITLES = {
    "softmax_token_choice": "Softmax Token Choice",
    "sinkhorn_token_choice": "Sinkhorn Token Choice",
    "softmax_expert_choice": "Softmax Expert Choice",
    "sinkhorn_expert_choice": "Sinkhorn Expert Choice",
    "sparsity_constrained_expert_choice": "Sparsity-constrained Exp. Choice",
    "soft": "Soft MoE",
}


def patches_of(photo: Tensor) -> Tensor:
    """Cuts pixels [H, W, 3] into patches [rows, columns, 3, 16, 16]."""
    return photo.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)


def tokens_of(patches: Tensor) -> Tensor:
    """Makes tokens [1, T, D] of patches: mean colour, contrast and height, standardised."""
    rows, columns = patches.shape[:2]
    height = torch.linspace(0, 1, rows).view(-1, 1, 1).expand(rows, columns, 1)
    contrast = patches.std((-1, -2)).mean(-1, keepdim=True)
    features = torch.cat([patches.mean((-1, -2)), contrast, height], -1).flatten(0, 1)
    return ((features - features.mean(0)) / features.std(0)).unsqueeze(0)


def weights_of(tokens: Tensor) -> Tensor:
    """Makes router weights [E, D] of length 1: the directions of the centres of E clusters."""
    centres = torch.tensor(KMeans(EXPERTS, n_init=4, random_state=0).fit(tokens[0].numpy()).cluster_centers_)
    return centres / centres.norm(dim=1, keepdim=True)


def route(name: str, tokens: Tensor, weight: Tensor) -> vr.Routing:
    """Routes with the router `name`, in eval mode."""
    options = {"slots_per_expert": 4, "scale_init": 20.0} if name == "soft" else {}
    router = vr.create_router(name, tokens.shape[-1], EXPERTS, **options).eval()
    # Noise makes the slots of one expert differ.
    start = weight.T.unsqueeze(-1) + 0.3 * torch.randn(router.phi.shape) if name == "soft" else 2 * weight
    (router.phi if name == "soft" else router.weight).copy_(start)
    return router(tokens)


def picture(routing: vr.Routing, grey: Tensor) -> Tensor:
    """Makes pixels [H, W, 3]. A patch has the colour of its expert with the largest weight, and is dark without one."""
    rows, columns = grey.shape[0] // PATCH, grey.shape[1] // PATCH
    strength, expert = routing.dispatch_tensor()[0].sum(-1).max(-1)  # [T]
    strength = (strength / strength.quantile(0.95)).clamp(max=1).sqrt().view(rows, columns, 1)

    def pixels(values: Tensor) -> Tensor:
        return values.repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)

    colour, strength = pixels(COLOURS[expert].view(rows, columns, 3)), pixels(strength)
    return (colour * (0.35 + 0.75 * grey) * strength + 0.22 * grey * (1 - strength)).clamp(0, 1)


@torch.no_grad()
def draw(path: Path) -> None:
    """Routes the photograph and writes the picture."""
    torch.manual_seed(0)
    photo = torch.tensor(load_sample_image("china.jpg"))[4:420, :640] / 255  # [416, 640, 3]
    patches = patches_of(photo)
    tokens = tokens_of(patches)
    weight = weights_of(tokens)
    grey = photo.mean(-1, keepdim=True)

    figure, axes = plt.subplots(2, 4, figsize=(13, 4.85), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.04, h_pad=0.06)
    for ax in axes.flat:
        ax.axis("off")
    axes[0, 0].imshow(photo.numpy())
    axes[0, 0].set_title(f"{tokens.shape[1]:,} patches, {EXPERTS} experts", loc="left", fontsize=10)
    # Token Choice and Expert Choice of one affinity are side by side.
    places = [axes[0, 1], axes[0, 2], axes[1, 1], axes[1, 2], axes[1, 3], axes[0, 3]]
    order = ("softmax_token_choice", "softmax_expert_choice", "sinkhorn_token_choice", "sinkhorn_expert_choice")
    for ax, name in zip(places, (*order, "sparsity_constrained_expert_choice", "soft"), strict=True):
        routing = route(name, tokens, weight)
        ax.imshow(picture(routing, grey).numpy())
        ax.set_title(TITLES[name], loc="left", fontsize=10)
        ax.set_title(f"{routing.metrics['dropped']:.0%} dropped", loc="right", fontsize=8, color="0.4")
    handles = [plt.Line2D([], [], marker="s", ls="", ms=10, color=c.tolist(), mec="0.5", mew=0.5) for c in COLOURS]
    handles.append(plt.Line2D([], [], marker="s", ls="", ms=10, color="0.15"))
    labels = [f"expert {e}" for e in range(EXPERTS)] + ["no expert"]
    axes[1, 0].legend(handles, labels, loc="center", frameon=False, ncols=2, fontsize=11)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=PAGE)
    draw(parser.parse_args().out)
