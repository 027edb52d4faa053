"""Label, marker and colour of every router in tables and figures."""

from __future__ import annotations

import zlib
from typing import NamedTuple


class Style(NamedTuple):
    """Look of a router in every table and figure."""

    title: str
    short: str
    marker: str
    color: str


# Okabe and Ito's palette, which colour-blind readers can tell apart. Every router also has its own marker.
_DENSE = Style("Dense ViT", "Dense ViT", "*", "#222222")
_STYLES = {
    "softmax_token_choice": Style("Softmax Token Choice", "Softmax TC", "o", "#0072B2"),
    "sinkhorn_token_choice": Style("Sinkhorn Token Choice", "Sinkhorn TC", "s", "#56B4E9"),
    "softmax_expert_choice": Style("Softmax Expert Choice", "Softmax EC", "^", "#D55E00"),
    "sinkhorn_expert_choice": Style("Sinkhorn Expert Choice", "Sinkhorn EC", "v", "#E69F00"),
    "sparsity_constrained_expert_choice": Style("Sparsity-constrained Expert Choice", "Constrained EC", "D", "#CC79A7"),
    "soft": Style("Soft MoE", "Soft MoE", "p", "#009E73"),
}
_OWN_MARKERS = ("h", "X", "P", "d", "<", ">", "8")
_OWN_COLORS = ("#8C564B", "#7B3294", "#888888", "#66710E", "#B2182B")


def style(router: str | None) -> Style:
    """Returns the style of a router, or of the dense ViT for None.

    An own router, ``package.module:factory``, has the name of its factory as title. A hash chooses marker and colour.
    """
    if router is None:
        return _DENSE
    if router in _STYLES:
        return _STYLES[router]
    number = zlib.crc32(router.encode())
    marker = _OWN_MARKERS[number % len(_OWN_MARKERS)]
    color = _OWN_COLORS[number // len(_OWN_MARKERS) % len(_OWN_COLORS)]
    name = router.rpartition(":")[2]
    return Style(name, name, marker, color)


def short_label(router: str | None, label: str) -> str:
    """Returns the label of a variant with the router's short name, for example "Softmax TC, K=2, 0.5x"."""
    look = style(router)
    return label.replace(look.title, look.short)
