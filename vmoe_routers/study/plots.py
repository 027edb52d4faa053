"""Draws the figures of the study from the numbers that `vmoe_routers.study.figures` collects."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.claims import scale_of, text_of
from vmoe_routers.study.styles import style
from vmoe_routers.study.summary import MEASURES

Data = list[dict[str, Any]]


_K_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_GRID = {"color": "#e6e6e6", "linewidth": 0.8}


def _figure(width: float, height: float) -> Figure:
    """Makes an empty figure with room between the panels. Sizes are in inches."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1, wspace=0.03)
    return figure


_ACCURACY = ("accuracy", "accuracy (%)", 100.0, "upper")
_LOSS = ("loss", "loss (nats)", 1.0, "lower")
_TIME = ("train_seconds", "training time (s)", 1.0)
_FLOPS = ("flops", "FLOPs of a forward pass, per image (M)", 1e-6)


def paint_figure_1(data: Data) -> Figure:
    """Draws training time and FLOPs against accuracy and loss; only FLOPs if no step was timed."""
    return _scatter(data, [[(x, y) for y in (_ACCURACY, _LOSS)] for x in dict.fromkeys((_cost(data), _FLOPS))])


def paint_figure_2(data: Data) -> Figure:
    """Draws training time against 10-shot transfer accuracy; FLOPs instead of training time if no step was timed."""
    label = f"10-shot accuracy on {', '.join(sorted({point['data'] for point in data}))} (%)"
    return _scatter(data, [[(_cost(data), ("transfer_accuracy", label, 100.0, "upper"))]])


def _cost(data: Data) -> tuple[str, str, float]:
    return _FLOPS if any(point[_TIME[0]] is None for point in data) else _TIME


def _scatter(data: Data, grid: list[list[tuple]]) -> Figure:
    """Draws a panel for every pair of axes, with the legend under the panels."""
    columns = len(grid[0])
    figure = _figure(11.5 if columns > 1 else 8.5, 1.6 + 4.6 * len(grid))
    panels = figure.subplots(len(grid), columns, squeeze=False)
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for point in data:
        kind = point["router"], point["top_k"], point["combine"] == "plan", bool(point["batch_priority"])
        kinds.setdefault(kind, []).append(point)
    for ax, (x, y) in zip(panels.flat, (axes for row in grid for axes in row), strict=True):
        for kind, points in kinds.items():
            _draw_kind(ax, kind, points, x, y)
        _draw_front(ax, data, x, y)
        ax.set_xlabel(x[1])
        ax.set_ylabel(y[1], parse_math=False)
        ax.grid(**_GRID)
        ax.set_axisbelow(True)
        ax.margins(0.08)
        ax.spines[["top", "right"]].set_visible(False)
    _scatter_legend(figure, data, list(kinds), columns=3 if columns > 1 else 2)
    return figure


def front(points: list[tuple[float, float]], best: str) -> list[tuple[float, float]]:
    """Returns the points for which no other point has both a smaller cost and a better value.

    Args:
        points: Cost and value.
        best: "upper" or "lower": which values are better.
    """
    sign = 1.0 if best == "upper" else -1.0
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if math.isfinite(value) and (not found or sign * value > sign * found[-1][1]):
            found.append((cost, value))
    return found


def _draw_front(ax: Axes, data: Data, x: tuple, y: tuple) -> None:
    points = front([(point[x[0]] * x[2], point[y[0]] * y[2]) for point in data], y[3])
    if len(points) > 1:
        costs, values = zip(*points, strict=True)
        ax.step(costs, values, where="post", color="#57606a", linestyle="--", linewidth=1.2, zorder=0.5, gid="front")


def _draw_kind(ax: Axes, kind: tuple, points: Data, x_axis: tuple, y_axis: tuple) -> None:
    """Draws the points of one router, K, combine and priority. A thin line joins the capacity factors."""
    color = style(kind[0]).color
    (x_key, _, x_scale), (y_key, _, y_scale, _) = x_axis, y_axis
    x = [point[x_key] * x_scale for point in points]
    y = [point[y_key] * y_scale for point in points]
    x_error = [(point.get(f"{x_key}_error") or 0.0) * x_scale for point in points]
    y_error = [(point[f"{y_key}_error"] or 0.0) * y_scale for point in points]
    ax.errorbar(x, y, y_error, x_error, fmt="none", ecolor=color, elinewidth=1.0, alpha=0.7, zorder=2)
    if len(points) > 1:
        ax.plot(x, y, color=color, linewidth=0.8, alpha=0.5, zorder=1)
    for point, at_x, at_y in zip(points, x, y, strict=True):
        for artist in _markers(kind, _size(point["capacity_factor"])):
            artist.set_data([at_x], [at_y])
            artist.set_zorder(3)
            ax.add_line(artist)
        artist.set_gid(point["name"])
    ax.autoscale_view()


def _size(capacity_factor: float | None) -> float:
    """Computes the diameter of a marker in points. Its area follows the capacity factor, clamped to [0.2, 5]."""
    return 9.0 * math.sqrt(min(max(capacity_factor or 1.0, 0.2), 5.0))


def _markers(kind: tuple, size: float) -> tuple[Line2D, ...]:
    """Makes the artists of a point: shape and colour of the router, a white inside for K = 1, a dot for the plan."""
    router, top_k, plan, priority = kind
    look = style(router)
    size *= 1.5 if look.marker == "*" else 0.85 if look.marker in "Ds" else 1.0
    face = "white" if top_k == 1 else look.color
    fill: Any = "bottom" if top_k is not None and top_k > 2 else "full"
    common: dict[str, Any] = {"linestyle": "none", "markeredgewidth": 1.6, "fillstyle": fill}
    marker = Line2D([], [], marker=look.marker, color=look.color, markersize=size, markerfacecolor=face, **common)
    if not plan and not priority:
        return (marker,)
    shape, edge = ("o", 0.0) if plan else ("x", 1.4)
    inner = Line2D([], [], marker=shape, color="#222222", markersize=0.4 * size, linestyle="none", markeredgewidth=edge)
    return (marker, inner)


def _scatter_legend(figure: Figure, data: Data, kinds: list[tuple], columns: int) -> None:
    handles: list[Any] = []  # tuples of artists, which HandlerTuple draws on top of each other
    labels = []
    for router, top_k, plan, priority in kinds:
        handles.append(_markers((router, top_k, plan, priority), _size(1.0)))
        labels.append(style(router).title + (f", K = {top_k}" if top_k else "") + (", plan combine" if plan else ""))
        labels[-1] += ", batch priority" if priority else ""
    for capacity in sorted({point["capacity_factor"] for point in data} - {None}):
        grey = {"color": "#999999", "linestyle": "none", "markeredgewidth": 0}
        handles.append((Line2D([], [], marker="o", markersize=_size(capacity), **grey),))
        labels.append(f"size: capacity factor {capacity:g}")
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handler_map={tuple: HandlerTuple(ndivide=1)},
    )


def paint_figure_3(data: Data) -> Figure:
    """Draws two panels per capacity factor. The colour shows K, the line style the values that combine uses."""
    capacities = sorted({point["capacity_factor"] or 1.0 for point in data})
    figure = _figure(11.5, 1.2 + 3.9 * len(capacities))
    grid = figure.subplots(len(capacities), 2, squeeze=False, sharex=True)
    top_ks = sorted({point["top_k"] or 1 for point in data})
    legend: dict[str, Line2D] = {}
    for capacity, axes in zip(capacities, grid, strict=True):
        here = [point for point in data if (point["capacity_factor"] or 1.0) == capacity]
        curves: dict[str, Data] = {}
        for point in here:
            curves.setdefault(point["name"], []).append(point)
        for ax, (key, label, scale) in zip(
            axes, [("accuracy", "accuracy (%)", 100.0), ("loss", "loss (nats)", 1.0)], strict=True
        ):
            for curve in curves.values():
                top_k, plan = curve[0]["top_k"] or 1, curve[0]["combine"] == "plan"
                color = _K_COLORS[top_ks.index(top_k) % len(_K_COLORS)]
                line = _draw_curve(ax, curve, key, scale, color, "--" if plan else "-")
                legend[f"K = {top_k}, {'plan' if plan else 'softmax'} combine"] = line
            _frame_late_epochs(ax, list(curves.values()), key, scale)
            ax.set_ylabel(label)
            ax.grid(**_GRID)
            ax.spines[["top", "right"]].set_visible(False)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if len(capacities) > 1:
                ax.set_title(f"capacity factor {capacity:g}", fontsize=10)
    for ax in grid[-1]:
        ax.set_xlabel("epoch")
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9, handlelength=3
    )
    return figure


def _draw_curve(ax: Axes, curve: Data, key: str, scale: float, color: str, linestyle: str) -> Line2D:
    epochs = [point["epoch"] for point in curve]
    mean = [point[key] * scale for point in curve]
    errors = [point[f"{key}_error"] for point in curve]
    # A line through one point is invisible, so a marker replaces it: filled for solid lines, empty for dashed lines.
    point: Any = {"marker": "o" if len(curve) == 1 else "", "fillstyle": "full" if linestyle == "-" else "none"}
    (line,) = ax.plot(epochs, mean, linestyle, color=color, linewidth=1.8, gid=curve[0]["name"], **point)
    if None not in errors:
        low = [value - error * scale for value, error in zip(mean, errors, strict=True)]
        high = [value + error * scale for value, error in zip(mean, errors, strict=True)]
        ax.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
    return line


def _frame_late_epochs(ax: Axes, curves: list[Data], key: str, scale: float) -> None:
    """Fits the y axis to the last three quarters of the epochs: the first epochs would make later differences tiny."""
    late = [point for curve in curves for point in curve[len(curve) // 4 :]]
    values = [(point[key] + sign * (point[f"{key}_error"] or 0.0)) * scale for point in late for sign in (-1, 1)]
    values = [value for value in values if math.isfinite(value)]
    if values and max(values) > min(values):
        margin = 0.05 * (max(values) - min(values))
        ax.set_ylim(min(values) - margin, max(values) + margin)


def paint_figure_load(data: Data) -> Figure:
    """Draws the load over the even share: a panel per variant, a line per MoE layer, later blocks darker."""
    variants: dict[str, dict[int, Data]] = {}
    for point in data:
        variants.setdefault(point["name"], {}).setdefault(point["block"], []).append(point)
    columns = min(4, len(variants))
    rows = math.ceil(len(variants) / columns)
    figure = _figure(2.8 * max(columns, 2), 0.6 + 2.0 * rows)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for ax in grid.flat[len(variants) :]:
        ax.remove()
    for ax in grid.flat[: len(variants)][-columns:]:  # the lowest panel of every column
        ax.tick_params(labelbottom=True)
    for ax, (name, blocks) in zip(grid.flat, variants.items(), strict=False):
        _draw_load(ax, name, blocks)
    grid[0, 0].set_ylim(bottom=0)  # last, because the panels share the axis and a limit turns autoscaling off
    figure.supxlabel("expert, from most to least loaded", fontsize=10)
    figure.supylabel("load / even share", fontsize=10)
    return figure


def _draw_load(ax: Axes, name: str, blocks: dict[int, Data]) -> None:
    first = next(iter(blocks.values()))[0]
    for place, (block, points) in enumerate(blocks.items(), start=1):
        shade = {"color": style(first["router"]).color, "alpha": 0.2 + 0.8 * place / len(blocks)}
        ranks, loads = ([point[key] for point in points] for key in ("rank", "relative_load"))
        ax.plot(ranks, loads, marker="o", markersize=3, linewidth=1.5, gid=f"{name} {block}", **shade)
    ax.axhline(1.0, color="#222222", linewidth=1.0, linestyle=":", zorder=1)
    ax.set_title(first["label"].replace(" Choice, ", " Choice\n"), fontsize=8.5, parse_math=False)
    ax.tick_params(labelsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(**_GRID)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def paint_forest(data: Data) -> Figure:
    """Draws the differences of every comparison with their intervals: a row per claim, a column per measure.

    The axis of the loss is reversed, so that a mark on the right of 0 supports the claim in both columns.
    """
    measures = list(dict.fromkeys(point["measure"] for point in data))
    rows: dict[str, list[str]] = {}  # the comparisons of each claim, from top to bottom
    for point in data:
        whats = rows.setdefault(point["claim"], [])
        if point["what"] not in whats:
            whats.append(point["what"])
    heights = [len(whats) + 0.6 for whats in rows.values()]
    figure = _figure(3.5 + 4.0 * len(measures), 0.8 + 0.27 * sum(map(len, rows.values())) + 0.66 * len(rows))
    grid = figure.subplots(len(rows), len(measures), squeeze=False, sharey="row", height_ratios=heights)
    for measure, column in zip(measures, grid.T, strict=True):
        last: Axes | None = None  # the lowest panel with differences; claim vi has correlations
        for ax, (claim, whats) in zip(column, rows.items(), strict=True):
            points = [point for point in data if (point["claim"], point["measure"]) == (claim, measure)]
            if not points and measure != measures[0]:  # the first column has the labels of the row
                ax.remove()
                continue
            if claim != "vi" and last is not None:
                ax.sharex(last)  # before drawing, which then fits the shared limits
                last.tick_params(axis="x", labelbottom=False)
            _draw_comparisons(ax, points, whats, f"({claim}) {text_of(claim, measure)}", scale_of(claim, measure))
            if claim == "vi":
                ax.set_xlabel("rank correlation", fontsize=8)
            else:
                last = ax
        if last is not None:
            label = f"difference in {measure} ({MEASURES[measure].unit})"
            if MEASURES[measure].sign < 0:
                last.invert_xaxis()
                label += ", reversed axis"
            last.set_xlabel(label, fontsize=8)
    return figure


def _draw_comparisons(ax: Axes, points: Data, whats: Sequence[str], title: str, scale: float) -> None:
    """Draws the comparisons of one claim by one measure, each in the row of its two variants."""
    for point in points:
        color, place = style(point["router"]).color, whats.index(point["what"])
        ax.plot([scale * point["low"], scale * point["high"]], [place, place], color=color, linewidth=1.6)
        face = "white" if point["verdict"] == "not resolved" else color
        gid = f"{point['claim']}, {point['measure']}: {point['what']}"
        ax.plot([scale * point["mean"]], [place], "o", color=color, markerfacecolor=face, gid=gid)
    ax.axvline(0.0, color="#222222", linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(whats)), whats, fontsize=8, parse_math=False)
    ax.set_ylim(len(whats) - 0.5, -0.5)
    ax.set_title(textwrap.fill(title, 56), fontsize=9, loc="left", parse_math=False)
    ax.grid(axis="x", **_GRID)
    ax.set_axisbelow(True)
    ax.tick_params(axis="y", length=0)
    ax.tick_params(axis="x", labelsize=8)
    ax.spines[["top", "right", "left"]].set_visible(False)


def paint_ablations(data: Data) -> Figure:
    """Draws a small panel per ablation: its values against the accuracy, a line per router."""
    names = list(dict.fromkeys(point["ablation"] for point in data))
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = _figure(2.9 * max(columns, 2), 0.9 + 2.3 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax in grid.flat[len(names) :]:
        ax.remove()
    legend: dict[str, Line2D] = {}
    for ax, name in zip(grid.flat, names, strict=False):
        of = [point for point in data if point["ablation"] == name]
        arms = [arm.label for arm in ABLATIONS[name].arms]
        for router in dict.fromkeys(point["router"] for point in of):
            points = sorted((p for p in of if p["router"] == router), key=lambda point: arms.index(point["arm"]))
            look, x = style(router), [arms.index(point["arm"]) for point in points]
            y = [100 * point["accuracy"] for point in points]
            error = [100 * (point["accuracy_error"] or 0.0) for point in points]
            ax.errorbar(x, y, error, color=look.color, linewidth=1.2, elinewidth=1.0, gid=f"{name} {router}")
            for point, at_x, at_y in zip(points, x, y, strict=True):
                face = "white" if point["is_base"] else look.color
                ax.plot([at_x], [at_y], marker=look.marker, color=look.color, markerfacecolor=face, markersize=6)
            legend[look.title] = Line2D([], [], marker=look.marker, color=look.color, linewidth=1.2)
        ax.set_xticks(range(len(arms)), arms)
        ax.set_xlim(-0.4, len(arms) - 0.6)
        ax.set_title(ABLATIONS[name].title, fontsize=8.5, parse_math=False)
        ax.tick_params(labelsize=8)
        ax.grid(**_GRID)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    figure.supylabel("accuracy (%)", fontsize=10)
    figure.legend(
        legend.values(), legend.keys(), loc="outside lower center", ncols=max(columns, 2), frameon=False, fontsize=9
    )
    return figure
