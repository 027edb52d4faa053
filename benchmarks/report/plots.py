"""Figures of a run: the ratios to ours, and every variant under the machine's roof."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

# Okabe and Ito's palette: told apart by colour-blind readers too; the markers say the same.
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
    """Time of every variant over ours, with its interval: a row a case, a column a direction."""
    rows = list(dict.fromkeys((r["title"], r["size"]) for r in results))
    directions = list(dict.fromkeys(r["direction"] for r in results))
    size = (5 + 4 * len(directions), 1.4 + 0.36 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
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
    panels[0].set_yticks(range(len(rows)), [f"{case}\n{where}" for case, where in rows], fontsize=7)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    figure.supxlabel(f"time / time of ours (hollow: a different function; faint: UNSTABLE), {title}", fontsize=9)
    _legend(figure, {v["role"] for r in results for v in r["variants"][1:]}, loc="outside upper center", ncols=7)
    return figure


def roofline_figure(results: list[dict], ceilings: dict, threads: int) -> Figure:
    """flop/s against flop per byte of the cases that multiply, under the GEMM and the bandwidth roofs."""
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    shown = [r for r in results if r["threads"] == threads and r["floor"]["flops"] and r["floor"]["bytes"]]
    intensity = [r["floor"]["flops"] / r["floor"]["bytes"] for r in shown] or [1.0]
    left, right = min(intensity) / 3, max(intensity) * 3
    gemm = max(ceilings[kind] for kind in ("gemm", "gemm_layer", "gemm_bfloat16"))
    for level, style in zip(ceilings["read"], (":", "--", "-"), strict=False):
        rate = max(ceilings["read"][level], ceilings["copy"][level])
        xs = [left, min(max(gemm / rate, left), right), right]
        axes.plot(xs, [min(gemm, rate * x) for x in xs], color="0.4", linestyle=style, label=f"roof, {level}")
    roles = set()
    for result, x in zip(shown, intensity, strict=False):
        for v in result["variants"]:
            colour, marker = LOOKS[v["role"]]
            axes.plot(x, result["floor"]["flops"] / v["seconds"], marker=marker, color=colour, ms=5, linestyle="")
            roles.add(v["role"])
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(left, right)
    axes.set_ylim(top=3 * gemm)
    axes.set_xlabel("flop per byte that the case must move")
    axes.set_ylabel("flop/s (of the case's own flops)")
    axes.set_title(f"{threads} thread(s)", loc="left", fontsize=10)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    for x in sorted(set(intensity)):
        here = [r for r, other in zip(shown, intensity, strict=False) if other == x]
        lowest = min(r["floor"]["flops"] / v["seconds"] for r in here for v in r["variants"])
        names = ", ".join(dict.fromkeys(r["op"] for r in here))
        axes.annotate(
            names, (x, lowest), (0, -8), textcoords="offset points", rotation=90, ha="center", va="top", size=7
        )
    axes.set_ylim(bottom=axes.get_ylim()[0] / 30)  # room for the names
    _legend(axes, roles, axes.lines[: len(ceilings["read"])], loc="upper left", bbox_to_anchor=(1.01, 1))
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
    """Time against tokens, experts and groups; one thread solid, two dashed."""
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


def save_plots(run: dict, stem: Path) -> list[Path]:
    """`<stem>-ratios.png` of the first number of threads, `<stem>-roofline-<threads>.png`."""
    first = run["ceilings"][0]["threads"]
    shown = [r for r in run["results"] if r["threads"] == first and r["op"] != "overhead"] or run["results"]
    written = [stem.with_name(f"{stem.name}-ratios.png")]
    ratio_figure(shown, f"{first} thread(s)").savefig(written[0], dpi=110)
    for found in run["ceilings"]:
        threads = found["threads"]
        if not any(result["floor"]["flops"] for result in run["results"]):
            break
        written.append(stem.with_name(f"{stem.name}-roofline-{threads}.png"))
        roofline_figure(run["results"], found["ceilings"], threads).savefig(written[-1], dpi=130)
    return written
