"""Strategies that draw tensors: any scale, layout and dtype, ties, subnormal numbers, NaN and infinities.

Entries come from a seeded generator instead of one draw per entry, so that an example takes a millisecond. A failure
prints the description of its tensors (`Made`), from which `make` makes them again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Sizes around the vectors, blocks and special cases of the kernels.
GROUPS = st.sampled_from((1, 2, 0, 3))
TOKENS = st.sampled_from((5, 1, 2, 3, 8, 17, 33, 70, 0))
EXPERTS = st.sampled_from((4, 1, 2, 3, 7, 8, 9, 16, 17, 33, 65))
WIDTHS = st.sampled_from((4, 1, 3, 8, 17, 33, 0))


class Made(NamedTuple):
    """The description from which `make` makes a tensor."""

    seed: int
    values: str
    scale: float
    special: tuple[float, ...]
    share: float
    layout: str


VALUES = ("normal", "ties", "constant", "wide", "subnormal", "near")
LAYOUTS = ("contiguous", "strided", "transposed", "offset", "expanded")
SPECIAL = (-INF, INF, NAN, -0.0, 1e38, -1e38)


@st.composite
def recipes(draw: st.DrawFn, *, finite: bool = False, moderate: bool = False) -> Made:
    """Draws a description; `finite` without NaN and +-inf, `moderate` with scales around 1."""
    exponent = draw(st.sampled_from((0, 1, -1) if moderate else (0, 1, -1, 2, 4, -4, -10, 10, 20, -20, 30, -30)))
    special: tuple[float, ...] = ()
    if not finite and draw(st.booleans()):
        special = tuple(draw(st.lists(st.sampled_from(SPECIAL), min_size=1, max_size=2, unique_by=str)))
    return Made(
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from(VALUES[:3] if moderate else VALUES)),
        10.0**exponent,
        special,
        draw(st.sampled_from((0.01, 0.1, 0.5, 1.0))) if special else 0.0,
        draw(st.sampled_from(LAYOUTS)),
    )


def make(made: Made, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Makes the tensor that `made` describes; values beyond the dtype's range become its largest value."""
    generator = torch.Generator().manual_seed(made.seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if made.values == "ties":
        x = x.round()
    elif made.values == "constant":
        x = torch.ones_like(x)
    elif made.values == "near":  # neighbouring entries that differ in their last bits
        x = 1 + 2.0**-22 * x.round()
    elif made.values == "wide":
        x = x * 10 ** torch.empty_like(x).uniform_(-8, 8, generator=generator)
    elif made.values == "subnormal":
        x = x * torch.finfo(dtype).tiny / made.scale / 4
    top = torch.finfo(dtype).max
    x = (x * made.scale).clamp(-top, top)
    if made.special:
        picks = torch.tensor(made.special, dtype=torch.float64)
        chosen = picks[torch.randint(len(picks), shape, generator=generator)]
        chosen = torch.where(chosen.isinf() | chosen.isnan(), chosen, chosen.clamp(-top, top))
        x = torch.where(torch.rand(shape, generator=generator) < made.share, chosen, x)
    return laid_out(x.to(dtype), made.layout)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Gives the values of `x` in another layout; "expanded" repeats the first entry of the first axis."""
    if layout == "strided":
        wide = x.new_full([2 * size for size in x.shape], NAN)
        return wide[tuple(slice(None, None, 2) for _ in x.shape)].copy_(x)
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "offset":
        return torch.cat([x.new_full((3,), NAN), x.flatten()])[3:].view(x.shape)
    if layout == "expanded" and x.ndim and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


@st.composite
def tensors(
    draw: st.DrawFn, *shape: int, dtype: torch.dtype = torch.float64, finite: bool = False, moderate: bool = False
) -> Tensor:
    """Draws a tensor of this shape."""
    return make(draw(recipes(finite=finite, moderate=moderate)), shape, dtype)


@st.composite
def masks(draw: st.DrawFn, groups: int, tokens: int) -> Tensor | None:
    """Draws None or a mask [G, T]: no token, all tokens, some tokens, one token."""
    kind = draw(st.sampled_from(("none", "some", "no token", "all", "one")))
    if kind == "none":
        return None
    if kind in ("no token", "all"):
        return torch.full((groups, tokens), kind == "all")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if kind == "some":
        return torch.rand(groups, tokens, generator=generator) < 0.5
    return torch.arange(tokens).expand(groups, tokens) == draw(st.integers(0, max(tokens - 1, 0)))


def sizes(high: int) -> st.SearchStrategy[int]:
    """Draws a number of picks: 1, 2, a few, nearly all, all; 0 only of an empty axis."""
    choices = sorted({size for size in (1, 2, 3, high // 2, high - 1, high) if min(1, high) <= size <= high})
    return st.sampled_from(choices)
