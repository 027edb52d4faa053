"""Pictures of recorded routings, drawn by matplotlib without pyplot, so that nothing is shown or kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from vmoe_routers.inspect.layer import LayerTrace, selecting, weights_of
from vmoe_routers.routers import SoftRouting

# Okabe and Ito's palette, which colour-blind readers can tell apart. Violet replaces black, because dropped tokens are
# black.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#9911EE")
_MOST_SLOTS = 15
_MOST_NAMED = 16  # experts in a legend
_MOST_NUMBERED = 256  # patches with the number of their expert
_MOST_PREFIX = 8  # tokens before the patches: class token, distillation token and registers
_PANEL = 3.2  # inches


def colours(num_experts: int) -> list[tuple[float, float, float]]:
    """Returns a colour for every expert. For more than eight experts, neighbours differ in hue and lightness."""
    if num_experts <= len(_COLOURS):
        return [to_rgb(colour) for colour in _COLOURS[:num_experts]]
    hues = colormaps["hsv"](np.arange(num_experts) * 0.61803399 % 1.0)[:, :3]
    light = np.array([(0.0, 1.0), (0.45, 1.0), (0.0, 0.62)])[np.arange(num_experts) % 3]  # white share, brightness
    mixed = (hues * (1 - light[:, :1]) + light[:, :1]) * light[:, 1:]
    return [(float(r), float(g), float(b)) for r, g, b in mixed]


def tokens(layers: Sequence[LayerTrace], image: Any, index: int, grid: Any, *, with_image: bool = True) -> Figure:
    """Draws `Trace.plot_tokens`. Without the image, draws only the layers."""
    picture = _pixels("plot_tokens", image)
    height = _PANEL * picture.shape[0] / picture.shape[1] + 0.25
    figure, axes = _panels(with_image + len(layers), _PANEL, height)
    if with_image:
        axes[0].imshow(picture, interpolation="nearest")
        _titles(axes[0], "image", "")
    marks: set[str] = set()
    counts = np.zeros(max((layer.num_experts for layer in layers), default=1), dtype=int)
    for ax, layer in zip(axes[with_image:], layers, strict=True):
        marks |= _overlay(ax, layer, picture, index, grid, counts)
    for ax in axes:
        ax.axis("off")
    _legend(figure, counts, marks)
    return figure


def _overlay(ax: Axes, layer: LayerTrace, picture: np.ndarray, index: int, grid: Any, counts: np.ndarray) -> set[str]:
    """Draws one layer of `tokens`, counts the patches of every expert, and returns the marks that it drew."""
    routing, group, where = _image("plot_tokens", layer, index)
    taken, weight = (values[group, where] for values in weights_of(routing))
    rows, columns = _grid("plot_tokens", where.stop - where.start, picture, grid)
    first = where.stop - where.start - rows * columns
    taken, weight = taken[first:].float().cpu(), weight[first:].float().cpu()
    mask = None if routing.mask is None else routing.mask[group, where][first:].cpu()
    best, expert = torch.where(taken > 0, weight, -1.0).max(-1)
    real = torch.ones_like(expert, dtype=torch.bool) if mask is None else mask
    dropped = (taken.sum(-1) == 0) & real
    drawn = real & ~dropped
    # Strength grows with the weight, from the even share 1/E to 1. A sparse router takes a token or not, so its palest
    # colour is stronger than in Soft MoE, where an expert takes more or less of a token.
    even, palest = 1 / layer.num_experts, 0.1 if isinstance(routing, SoftRouting) else 0.35
    strength = palest + (0.8 - palest) * ((best - even) / max(1 - even, even)).clamp(0, 1).sqrt()

    palette = torch.tensor(colours(layer.num_experts))
    overlay = torch.cat([palette[expert], strength.unsqueeze(-1)], -1)
    overlay[dropped] = torch.tensor([0.0, 0.0, 0.0, 0.55])
    overlay[~real] = torch.tensor([1.0, 1.0, 1.0, 0.8])
    extent = (0.0, float(columns), float(rows), 0.0)
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, -1)
    ax.imshow(grey, extent=extent, interpolation="nearest")
    ax.imshow(overlay.view(rows, columns, 4).numpy(), extent=extent, interpolation="nearest")
    ax.set_aspect(picture.shape[0] / rows / (picture.shape[1] / columns))
    y, x = np.divmod(np.flatnonzero(dropped.numpy()), columns)
    size = 72 * _PANEL / max(rows, columns)  # side of a patch, in points
    ax.plot(x + 0.5, y + 0.5, ls="", marker="x", ms=min(0.35 * size, 6), mew=0.8, color="0.8")
    numbered = layer.num_experts > len(_COLOURS) and rows * columns <= _MOST_NUMBERED
    if numbered:
        below = torch.tensor(grey[..., 0]).view(1, 1, *grey.shape[:2])
        below = torch.nn.functional.adaptive_avg_pool2d(below, (rows, columns)).flatten()
        seen = palette[expert].mean(-1) * strength + below * (1 - strength)
        for patch in drawn.nonzero().flatten().tolist():
            row, column = divmod(patch, columns)
            ax.text(
                column + 0.5, row + 0.5, str(int(expert[patch])), ha="center", va="center",
                fontsize=min(0.55 * size, 9), color="white" if seen[patch] < 0.5 else "black",
            )  # fmt: skip
    counts += np.bincount(expert[drawn].numpy(), minlength=len(counts))
    _titles(ax, layer.name or layer.title, f"{dropped.sum() / max(int(real.sum()), 1):.0%} dropped")
    marks = {"dropped": dropped.any(), "padding": (~real).any(), "numbers": numbered}
    return {name for name, found in marks.items() if found}


def _legend(figure: Figure, counts: np.ndarray, marks: set[str]) -> None:
    """Names the experts in the picture, at most `_MOST_NAMED` by number of patches, and the marks."""
    palette, present = colours(len(counts)), [int(e) for e in np.argsort(-counts, kind="stable") if counts[e]]
    present = [] if "numbers" in marks else present
    square = {"marker": "s", "ls": "", "ms": 9, "mec": "0.5", "mew": 0.5}
    named = sorted(present[:_MOST_NAMED])
    handles = [Line2D([], [], color=palette[e], **square) for e in named]  # type: ignore[arg-type]
    labels = [f"expert {e}" for e in named]
    if len(present) > len(named):
        handles.append(Line2D([], [], ls=""))
        labels.append(f"and {len(present) - len(named)} more")
    if "dropped" in marks:
        handles.append(Line2D([], [], marker="x", ls="", ms=8, color="black"))
        labels.append("dropped")
    if "padding" in marks:
        handles.append(Line2D([], [], color="white", **square))  # type: ignore[arg-type]
        labels.append("padding")
    if not labels:
        return
    width, height = figure.get_size_inches()
    columns = max(1, min(len(labels), int(width / 1.05)))
    figure.set_size_inches(width, height + 0.2 + 0.21 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=9,
                  handletextpad=0.2, columnspacing=1.0)  # fmt: skip


def slots(layer: LayerTrace, image: Any, index: int, grid: Any) -> Figure:
    """Draws `Trace.plot_slots`."""
    routing, group, where = _image("plot_slots", layer, index)
    if not isinstance(routing, SoftRouting):
        raise ValueError(f"plot_slots: layer {layer.name!r} must be Soft MoE, got {layer.title}; use plot_tokens")
    picture = _pixels("plot_slots", image)
    rows, columns = _grid("plot_slots", where.stop - where.start, picture, grid)
    first = where.stop - rows * columns
    weights = routing.dispatch_tensor()[group].detach().float().cpu()  # [T, E, C], over the tokens of the group
    # Take the first slot of every expert, then the second slots, and so on, up to `_MOST_SLOTS`.
    order = [(e, c) for c in range(routing.capacity) for e in range(routing.num_experts)][:_MOST_SLOTS]
    order.sort()
    maps = [weights[first : where.stop, e, c].view(rows, columns).numpy() for e, c in order]
    even = 1 / (routing.num_tokens if routing.mask is None else max(int(routing.mask[group].sum()), 1))
    # Scale to a quantile, because the maximum may be a single large weight, which would make all other maps dark.
    most = max(float(np.quantile(np.stack(maps), 0.99)) / even, 2.0)
    figure, (first_ax, *axes) = _panels(1 + len(order), 2.2, 2.2 * picture.shape[0] / picture.shape[1] + 0.3)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.9)  # for the colour bar
    first_ax.imshow(picture, interpolation="nearest")
    first_ax.axis("off")
    _titles(first_ax, "image", "", 9)
    drawn: Any = None
    for ax, values, (e, c) in zip(axes, maps, order, strict=True):
        drawn = ax.imshow(values / even, cmap="magma", vmin=0, vmax=most, interpolation="nearest")
        ax.set_aspect(picture.shape[0] / rows / (picture.shape[1] / columns))
        _titles(ax, f"expert {e}" if routing.capacity == 1 else f"expert {e}, slot {c}", "", 9)
        ax.axis("off")
    bar = figure.colorbar(
        drawn, ax=[first_ax, *axes], location="bottom", extend="max", fraction=0.04, aspect=40, pad=0.02
    )
    bar.set_label("weight of a patch in the slot (1 everywhere: the mean of all tokens)", fontsize=9)
    count = routing.num_experts * routing.capacity
    shown = f", {len(order)} of {count} slots" if len(order) < count else ""
    figure.suptitle(f"{layer.name or layer.title}{shown}", fontsize=10)
    return figure


def load(layers: Sequence[LayerTrace]) -> Figure:
    """Draws `Trace.plot_load`."""
    figure, axes = _panels(len(layers), _PANEL, 2.6)
    for ax, layer in zip(axes, layers, strict=True):
        values, experts = layer.load.numpy(), np.arange(layer.num_experts)
        ax.bar(experts, values, color=colours(layer.num_experts), edgecolor="0.4", lw=0.5)
        lines = [ax.axhline(values.mean(), color="black", lw=1, ls="--", label="even load")]
        if not isinstance(layer.routings[0], SoftRouting):
            slots = sum(routing.num_groups * routing.capacity for routing in layer.routings) / max(layer.num_images, 1)
            lines.append(ax.axhline(slots, color="#B2182B", lw=1, ls=":", label="capacity"))
        dead = experts[values == 0]
        if len(dead):
            mark = {"ls": "", "marker": "x", "color": "#B2182B", "clip_on": False, "zorder": 3}
            lines += ax.plot(dead, np.zeros(len(dead)), label="dead", **mark)  # type: ignore[arg-type]
        ax.set_ylim(0, max(1e-9, *(line.get_ydata()[0] for line in lines), values.max()) * 1.35)  # type: ignore[index]
        ax.legend(handles=lines, frameon=False, fontsize=8, ncols=3, loc="upper right", handlelength=1.5)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_xlabel("expert")
        ax.set_ylabel("tokens per image")
        _titles(ax, layer.name or layer.title, f"cv {layer.load_cv:.2f}")
    return figure


def plan(layer: LayerTrace, group: int) -> Figure:
    """Draws `Trace.plot_plan`."""
    groups = [(routing, g) for routing in layer.routings for g in range(routing.num_groups)]
    if not -len(groups) <= group < len(groups):
        raise ValueError(f"plot_plan: group must be in [0, {len(groups) - 1}], the recorded groups, got {group}")
    routing, number = groups[group]
    try:
        gates = selecting(routing)[number].float().cpu()  # [T, E]
    except ValueError as error:
        raise ValueError(f"plot_plan: layer {layer.name!r}: {error}; use plot_slots") from None
    taken = routing.dispatch_tensor()[number].sum(-1).cpu() > 0
    if routing.mask is not None:
        gates, taken = gates[routing.mask[number].cpu()], taken[routing.mask[number].cpu()]
    best, expert = gates.max(1)
    order = sorted(range(len(gates)), key=lambda t: (not best[t] > 0, int(expert[t]), -float(best[t])))
    gates, taken = gates[order].numpy(), taken[order].numpy()
    size, experts = gates.shape
    figure = Figure(figsize=(6, 1.6 + min(0.25 * experts, 4)), layout="constrained")
    sums, heat = figure.subplots(2, 2, width_ratios=(6, 1), height_ratios=(1, 3), sharex="col", sharey="row")
    drawn = heat[0].imshow(
        gates.T, aspect="auto", cmap="viridis", interpolation="nearest", extent=(0, size, experts - 0.5, -0.5), vmin=0
    )
    where = np.argwhere(taken)
    heat[0].plot(where[:, 0] + 0.5, where[:, 1], ls="", marker=".", ms=2.5, color="white", mec="black", mew=0.3)
    heat[0].set_xlabel("tokens by largest gate (dots: got a slot)")
    heat[0].set_ylabel("expert")
    heat[0].yaxis.get_major_locator().set_params(integer=True)
    sums[0].fill_between(np.arange(size) + 0.5, gates.sum(1), step="mid", color="0.7")
    sums[0].set_ylabel("sum")
    sums[0].set_ylim(0, max(1.2, 1.1 * float(gates.sum(1).max(initial=0))))
    heat[1].barh(np.arange(experts), gates.sum(0), color=colours(experts), edgecolor="0.4", lw=0.5)
    heat[1].set_xlabel("sum")
    sums[1].axis("off")
    if layer.is_transport:
        sums[0].axhline(1, color="black", lw=1, ls="--")
        heat[1].axvline(size / experts, color="black", lw=1, ls="--")
    figure.colorbar(drawn, ax=heat[1], fraction=0.3, label="plan" if layer.is_transport else "gate")
    _titles(sums[0], layer.name or layer.title, layer.title if layer.name else "")
    for ax in (*sums, *heat):
        ax.spines[["top", "right"]].set_visible(False)
    return figure


def specialisation(layers: Sequence[LayerTrace], labels: Tensor | Sequence[int], names: Sequence[str] | None) -> Figure:
    """Draws `Trace.plot_specialisation`."""
    tables = [layer.by_class(labels, None if names is None else len(names)).numpy() for layer in layers]
    classes = len(tables[0])
    figure, axes = _panels(len(layers), _PANEL, 1.4 + min(0.22 * classes, 8))
    drawn: Any = None
    highest = max(float(table.max(initial=0)) for table in tables)
    for ax, table, layer in zip(axes, tables, layers, strict=True):
        drawn = ax.imshow(table, aspect="auto", cmap="viridis", vmin=0, vmax=highest or 1, interpolation="nearest")
        ax.set_xlabel("expert")
        ax.xaxis.get_major_locator().set_params(integer=True)
        if names is None or classes > 40:
            ax.set_ylabel("class")
            ax.yaxis.get_major_locator().set_params(integer=True)
        else:
            ax.set_yticks(range(classes), names, fontsize=8)
        _titles(ax, layer.name or layer.title, f"even: {1 / layer.num_experts:.2f}")
    figure.colorbar(drawn, ax=axes, label="share of tokens")
    return figure


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Any]]:
    """Makes a figure of `count` panels in at most four columns. Sizes are in inches."""
    columns = 3 if count % 3 == 0 and count % 4 else min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(columns * width, _PANEL), rows * height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.07)  # type: ignore[union-attr]
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def _titles(ax: Axes, left: str, right: str, size: float = 10) -> None:
    ax.set_title(left, loc="left", fontsize=size, parse_math=False)
    ax.set_title(right, loc="right", fontsize=size - 2, color="0.4")


def _image(where: str, layer: LayerTrace, index: int) -> Any:
    try:
        return layer.image(index)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _grid(where: str, count: int, picture: np.ndarray, grid: Any) -> tuple[int, int]:
    """Finds rows and columns of patches in the ratio of the picture's sides.

    The tokens before the patches are as few as possible.
    """
    if grid is not None:
        rows, columns = grid
        if not (rows > 0 and columns > 0 and rows * columns <= count):
            raise ValueError(f"{where}: grid must be rows and columns of at most {count} patches, got {grid!r}")
        return int(rows), int(columns)
    height, width = picture.shape[:2]
    for patches in range(count, max(0, count - _MOST_PREFIX - 1), -1):
        rows = round(math.sqrt(patches * height / width))
        if rows and patches % rows == 0 and rows * width == patches // rows * height:
            return rows, patches // rows
    raise ValueError(
        f"{where}: {count} tokens are no grid of square patches on an image of {height} x {width} pixels; "
        "give the image as the model saw it, or grid=(rows, columns)"
    )


def _pixels(where: str, image: Any) -> np.ndarray:
    """Converts an image to float [H, W, 3] in [0, 1]."""
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = image.permute(1, 2, 0) if image.ndim == 3 and image.shape[0] in (1, 3) else image
        image = image.float() if image.is_floating_point() else image
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or not pixels.size:
        raise ValueError(
            f"{where}: image must be a picture, [H, W, 3] or a tensor [channels, H, W], got {pixels.shape}"
        )
    if pixels.dtype == np.uint8:
        pixels = pixels / 255
    pixels = np.repeat(pixels, 3, -1) if pixels.shape[2] == 1 else pixels
    low, high = float(pixels.min()), float(pixels.max())
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError(f"{where}: image must have finite values")
    if low < 0 or high > 1:
        pixels = (pixels - low) / max(high - low, 1e-9)
    return pixels.astype(np.float32)
