"""Figures of kept results: ratios to ours, and times over sizes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette, which colour-blind readers can tell apart. Every role also has its own marker.
LOOKS = {
    "ours": ("#000000", "o"),
    "naive": ("#E69F00", "v"),
    "index": ("#0072B2", "s"),
    "compiled": ("#56B4E9", "D"),
    "peer": ("#009E73", "^"),
    "dense": ("#CC79A7", "x"),
    "yardstick": ("#D55E00", "+"),
}


def _legend(parent, roles: set[str], lines=(), **where) -> None:
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=role)
        for role, (colour, marker) in LOOKS.items()
        if role in roles
    ]
    parent.legend(handles=[*lines, *handles], frameon=False, **where)


def ratio_figure(results: list[dict], title: str) -> Figure:
    """Plots the ratio of every variant to ours, with its interval: one row per case, one column per direction."""
    rows = list(dict.fromkeys((r["title"], r["size"]) for r in results))
    directions = list(dict.fromkeys(r["direction"] for r in results))
    inches = (5 + 4 * len(directions), 1.4 + 0.22 * len(rows))
    figure = Figure(figsize=inches, layout="constrained")
    panels = figure.subplots(1, len(directions), squeeze=False, sharey=True)[0]
    for axes, direction in zip(panels, directions, strict=True):
        for result in (r for r in results if r["direction"] == direction):
            row = rows.index((result["title"], result["size"]))
            for v in result["variants"][1:]:
                colour, marker = LOOKS[v["role"]]
                ratio = v["ratio"]
                alpha = 0.3 if result["unstable"] else 1
                axes.plot([ratio["low"], ratio["high"]], [row, row], color=colour, linewidth=1, alpha=alpha)
                hollow = "none" if v["different"] and marker not in "x+" else colour
                axes.plot(ratio["median"], row, marker, color=colour, mfc=hollow, ms=6, alpha=alpha)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelsize=7)
        axes.set_title(direction, fontsize=9)
        axes.grid(axis="x", color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
    several = len(rows) > len({case for case, _ in rows})  # whether a case has several sizes
    panels[0].set_yticks(range(len(rows)), [f"{c} ({size})" if several else c for c, size in rows], fontsize=7)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(f"time / time of ours (hollow: a different function; faint: UNSTABLE), {title}", fontsize=9)
    _legend(figure, {v["role"] for r in results for v in r["variants"][1:]}, loc="outside upper center", ncols=7)
    return figure


OP_COLOURS = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#D55E00",
    "#0072B2",
    "#CC79A7",
    "#999999",
    "#6A3D9A",
    "#B2DF8A",
)


def scaling_figure(curves: list[dict]) -> Figure:
    """Plots time over tokens, experts and groups; one thread solid, two dashed."""
    axes_names = list(dict.fromkeys(curve["axis"] for curve in curves))
    colours = dict(zip(dict.fromkeys(curve["op"] for curve in curves), OP_COLOURS, strict=False))
    figure = Figure(figsize=(5.2 * len(axes_names), 5.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(axes_names), squeeze=False)[0], axes_names, strict=True):
        for curve in (c for c in curves if c["axis"] == name):
            xs = [p["x"] for p in curve["points"]]
            for threads, style in (("1", "-"), ("2", "--")):
                ys = [1e3 * p["seconds"][threads] for p in curve["points"]]
                label = f"{curve['op']}: {curve['slope']['1']:.2f} ({curve['expected']:g})" if threads == "1" else None
                marker = "o" if threads == "1" else ""
                axes.plot(xs, ys, style, color=colours[curve["op"]], marker=marker, ms=3, lw=1.3, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(name)
        axes.set_ylabel("ms, forward")
        axes.grid(color="0.92", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.legend(
            frameon=False,
            fontsize=8,
            title="slope of the larger half (the algorithm's)",
            title_fontsize=8,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=2,
        )
    figure.suptitle("one thread solid, two dashed", fontsize=9, x=0.01, ha="left")
    return figure


def save_figures(run: dict, scaling: dict | None, stem: Path) -> None:
    """Writes `<stem>-ratios.png`, for the first number of threads, and `<stem>-scaling.png`."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    first = run["ceilings"][0]["threads"]
    shown = [r for r in run["results"] if r["threads"] == first and r["op"] != "overhead"] or run["results"]
    ratio_figure(shown, f"{first} thread(s)").savefig(f"{stem}-ratios.png", dpi=110)
    if scaling:
        scaling_figure(scaling["curves"]).savefig(f"{stem}-scaling.png", dpi=110)
