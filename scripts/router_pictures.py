"""Draws docs/routers/<router>.png: how each of the six routers routes the same twelve tokens to four experts.

    python scripts/router_pictures.py

It also runs the code of docs/index.md, which writes docs/start_routing.png.

The logits are drawn once. Expert 0 has the largest logit of most tokens. Every expert has three slots, so all experts
together have one slot per token (Soft MoE: one slot per expert).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

import vmoe_routers as vr

FOLDER = Path(__file__).parents[1] / "docs" / "routers"
TOKENS, EXPERTS = 12, 4


def tokens() -> Tensor:
    """Draws tokens [1, T, E], which are logits: the routers' weight is the identity."""
    drawn = 1.1 * torch.randn(1, TOKENS, EXPERTS, generator=torch.Generator().manual_seed(3))
    return drawn + torch.tensor([1.2, 0.0, 0.0, -0.4])


def router(name: str) -> torch.nn.Module:
    """Makes a router in eval mode whose weight is the identity."""
    options = {"scale_init": 5.0} if name == "soft" else {"capacity_multiple_of": 1}
    made = vr.create_router(name, EXPERTS, EXPERTS, **options).eval()
    identity = torch.eye(EXPERTS)
    (made.phi if name == "soft" else made.weight).copy_(identity.unsqueeze(-1) if name == "soft" else identity)
    return made


def panel(ax: Axes, values: Tensor, title: str, sums: bool = True) -> None:
    """Draws values [T, E] with experts as rows, and writes the sum of every row beside the row."""
    ax.imshow(values.T.numpy(), cmap="Blues", vmin=0, vmax=max(1.0, float(values.max())) * 1.15, aspect="auto")
    for token, row in enumerate(values.tolist()):
        for expert, value in enumerate(row):
            if value >= 0.005:
                colour = "white" if value > 0.6 else "0.25"
                text = f"{value:.2f}".lstrip("0") if value < 0.995 else "1"
                ax.text(token, expert, text, ha="center", va="center", color=colour)
    ax.set_title(title, loc="left")
    ax.set_yticks(range(EXPERTS), [f"expert {e}" for e in range(EXPERTS)])
    ax.set_xticks(range(TOKENS), [str(t) for t in range(TOKENS)])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if sums:
        for expert, total in enumerate(values.sum(0).tolist()):
            ax.text(TOKENS - 0.35, expert, f"Σ {total:.2f}", va="center", color="0.35")


def outline(ax: Axes, chosen: Tensor, wanted: Tensor | None = None) -> None:
    """Outlines chosen pairs [T, E], and draws a cross on pairs that were requested and dropped."""
    for token, expert in chosen.nonzero().tolist():
        ax.add_patch(plt.Rectangle((token - 0.47, expert - 0.45), 0.94, 0.9, fill=False, ec="#D55E00", lw=2.2))
    if wanted is not None:
        for token, expert in (wanted & ~chosen).nonzero().tolist():
            ax.plot([token - 0.45, token + 0.45], [expert - 0.42, expert + 0.42], color="#D55E00", lw=1.6)


def draw(name: str, path: Path) -> None:
    """Routes the tokens with the router `name` and writes the picture."""
    x = tokens()
    with torch.no_grad():
        routing = router(name)(x)
        probabilities, combine = x[0].softmax(-1), routing.combine_tensor()[0].sum(-1)
        dispatch = routing.dispatch_tensor()[0].sum(-1)
    if name == "soft":
        panels = [
            (dispatch, "Dispatch: softmax over tokens. Rows sum to 1", True),
            (combine, "Combine: softmax over slots. Columns sum to 1", False),
        ]
    else:
        by_token = name.endswith("token_choice")
        who = "every token its largest" if by_token else "every expert its three largest"
        selecting = probabilities
        panels = [(probabilities, "Softmax of the logits over the experts", True)]
        if not name.startswith("softmax"):
            affinity = vr.affinity.Sinkhorn() if name.startswith("sinkhorn") else vr.affinity.SparsityConstrained()
            selecting = affinity(x, x, 3, None)[0][0]
            kind = "Sinkhorn's plan" if name.startswith("sinkhorn") else "k-sparse plan, k = 3"
            panels.append((selecting, f"{kind}: every expert has the same sum", True))
        values, title, _ = panels[-1]
        panels[-1] = (values, f"{title}.\nOutlined: {who}" + (", crossed: no slot left" if by_token else ""), True)
        panels.append((combine, "Combine: the weight of each expert in a token's output", False))
    plt.rcParams["font.size"] = 11
    figure, axes = plt.subplots(len(panels), 1, figsize=(7.2, 1.95 * len(panels) + 0.3), layout="constrained")
    for ax, (values, title, sums) in zip(axes, panels, strict=True):
        panel(ax, values, title, sums)
    if name != "soft":
        wanted = torch.zeros_like(dispatch, dtype=torch.bool)
        if by_token:
            wanted[torch.arange(TOKENS), selecting.argmax(-1)] = True
        outline(axes[-2], dispatch > 0, wanted)
        for token in (dispatch.sum(-1) == 0).nonzero().flatten().tolist():
            axes[-1].text(token, 1.5, "no expert", rotation=90, ha="center", va="center", color="#D55E00")
    axes[-1].set_xlabel("token")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    for each in vr.ROUTERS:
        draw(each, FOLDER / f"{each}.png")
    os.chdir(FOLDER.parent)
    torch.set_num_threads(1)  # small models run fastest on one thread
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", Path("index.md").read_text(), re.DOTALL):
        exec(block, names)
