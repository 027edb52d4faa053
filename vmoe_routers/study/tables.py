"""Tables of the report, in HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from vmoe_routers.study.ablation_rows import AblationRow
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.claims import CLAIMS, scale_of, text_of, verdicts
from vmoe_routers.study.columns import shown_columns
from vmoe_routers.study.comparisons import MOST_SEEDS, POWER, Comparison
from vmoe_routers.study.orders import ORDERS, Condition, order_title
from vmoe_routers.study.styles import style
from vmoe_routers.study.summary import MEASURES, LayerRow, Row


def results_table(rows: Sequence[Row]) -> str:
    """Makes the table of results in HTML. Clear differences to the dense ViT have the class "clear"."""
    columns = shown_columns(rows)
    groups: dict[str, int] = {}
    for column in columns:
        groups[column.group] = groups.get(column.group, 0) + 1
    lines = ["<table><thead><tr><th></th>"]
    lines += [f'<th class="group" colspan="{count}">{escape(group)}</th>' for group, count in groups.items()]
    lines += ["</tr><tr><th>variant</th>"]
    lines += [f"<th>{escape(column.title)}<small>{escape(column.unit)}</small></th>" for column in columns]
    lines += ["</tr></thead><tbody>"]
    for row in rows:
        cells = [f"<tr><th>{_key(row.router)}{escape(row.label)}</th>"]
        for column in columns:
            value = getattr(row, column.key)
            clear = column.key.endswith("_difference") and value is not None and value.is_clear()
            cells.append(f"<td{' class=clear' if clear else ''}>{escape(column.text(row)).replace('±', ' ±')}</td>")
        lines.append("".join(cells) + "</tr>")
    return _scroll(lines)


def routing_table(rows: Sequence[LayerRow]) -> str:
    """Makes the table of routing metrics in HTML: one line per variant and MoE layer, with the load as small bars."""
    if not rows:
        return "<p>No run has a MoE layer.</p>"
    fields = [
        ("utilisation", "slots used", "%", ".0f", 100.0),
        ("load_cv", "load CV", "", ".2f", 1.0),
        ("dropped", "dropped", "%", ".1f", 100.0),
        ("entropy", "entropy", "nats", ".2f", 1.0),
        ("dead_experts", "dead", "experts", ".1f", 1.0),
    ]
    lines = ["<table><thead><tr><th>variant</th><th>block</th><th>load<small>per expert</small></th>"]
    lines += [f"<th>{title}<small>{unit}</small></th>" for _, title, unit, _, _ in fields]
    lines += ["</tr></thead><tbody>"]
    before = None
    for row in rows:
        named = f"{_key(row.router)}{escape(row.label)}" if row.name != before else ""
        cells = [f"<td>{row.block}</td><td>{_bars(row.load, style(row.router).color)}</td>"]
        for key, _, _, form, scale in fields:
            value = getattr(row, key)
            cells.append(f"<td>{'-' if value is None else format(value * scale, form)}</td>")
        lines.append(f"<tr{' class=first' if named else ''}><th>{named}</th>{''.join(cells)}</tr>")
        before = row.name
    note = (
        '<p class="note">Means over seeds, on the images of the final accuracy. The bars are the load of the experts, '
        "from the most to the least loaded in every seed. The line is the even share. The full height is "
        "twice the even share.</p>"
    )
    return note + _scroll(lines)


def claims_table(comparisons: Sequence[Comparison]) -> str:
    """Makes the table of claims by one measure in HTML: a line per claim with its verdicts, and one per comparison."""
    if not comparisons:
        return "<p>The study has no variants that a claim compares.</p>"
    titles = ("comparison", "seeds", "difference", "95 % interval", "p", "p, Holm", "seeds to resolve")
    lines = ["<table><thead><tr>", *(f"<th>{title}</th>" for title in titles), "<th>verdict</th></tr></thead><tbody>"]
    counted = verdicts(comparisons)
    measure = MEASURES[comparisons[0].measure]
    for claim in CLAIMS:
        of = [comparison for comparison in comparisons if comparison.claim == claim]
        if not of:
            continue
        text = text_of(claim, measure.name)
        head = f"({escape(claim)}) {escape(text)} <b>{escape(counted[claim][0].upper() + counted[claim][1:])}.</b>"
        lines.append(f'<tr class="first"><th colspan="8" class="claim">{head}</th></tr>')
        lines += [_claim_line(comparison) for comparison in of]
    differences = "points of accuracy, or rank correlations for claim vi" if measure.name == "accuracy" else "nats"
    note = (
        f'<p class="note">Differences are in {differences}. A {"positive" if measure.sign > 0 else "negative"} '
        "difference supports the claim. The mean of its comparisons, seed by seed, decides a claim. Verdicts are at "
        "the 5 % level after Holm's correction, over the claims and separately over all single comparisons. p-values "
        "are two-sided. <em>Seeds to resolve</em>: with so many seeds, a new study resolves a true difference of this "
        f"size and spread with a probability of {100 * POWER:g} %, at the 5 % level divided by the number of claims or "
        "of single comparisons.</p>"
    )
    return note + _scroll(lines)


def _claim_line(found: Comparison) -> str:
    name = f"<th>{_key(found.router)}{escape(found.what)}</th>"
    if found.mean is None:
        return f'<tr>{name}<td colspan="7" class="name">not comparable: {escape(found.reason or "no values")}</td></tr>'
    scale, form = scale_of(found.claim, found.measure), MEASURES[found.measure].form
    cells = [
        str(found.seeds),
        format(scale * found.mean, form),
        "-"
        if found.low is None or found.high is None
        else f"{scale * found.low:{form}} to {scale * found.high:{form}}",
        "-" if found.p is None else f"{found.p:.2g}",
        "-" if found.p_holm is None else f"{found.p_holm:.2g}",
        "-" if found.p is None else f"> {MOST_SEEDS}" if found.needed is None else str(found.needed),
        found.verdict,
    ]
    clear = "" if found.verdict == "not resolved" else ' class="clear"'
    return f"<tr>{name}{''.join(f'<td{clear}>{cell}</td>' for cell in cells)}</tr>"


def ablation_table(rows: Sequence[AblationRow]) -> str:
    """Makes the table of the ablations in HTML. Clear differences to the comparison's runs are bold."""
    titles = ("ablation", "router", "value", "seeds", "accuracy", "Δ accuracy", "loss", "Δ loss", "dropped")
    lines = ["<table><thead><tr>", *(f"<th>{title}</th>" for title in titles), "</tr></thead><tbody>"]
    before: tuple[str, str] | None = None
    for row in rows:
        is_first, is_new = before is None or before[0] != row.ablation, before != (row.ablation, row.label)
        before = (row.ablation, row.label)
        cells = [
            f"<th>{escape(ABLATIONS[row.ablation].title) if is_first else ''}</th>",
            f'<td class="name">{_key(row.router) + escape(row.label) if is_new else ""}</td>',
            f"<td>{escape(row.arm)}</td><td>{row.seeds}</td>",
            *(
                f"<td{' class=clear' if value is not None and form[0] == '+' and value.is_clear() else ''}>"
                f"{'-' if value is None else value.text(form, scale).replace('±', ' ±')}</td>"
                for value, form, scale in (
                    (row.accuracy, ".2f", 100.0),
                    (row.difference, "+.2f", 100.0),
                    (row.loss, ".4f", 1.0),
                    (row.loss_difference, "+.4f", 1.0),
                )
            ),
            f"<td>{'-' if row.dropped is None else f'{100 * row.dropped:.1f} %'}</td>",
        ]
        lines.append(f"<tr{' class=first' if is_first else ''}>{''.join(cells)}</tr>")
    note = (
        '<p class="note">Accuracy in %, differences in points, seed by seed. A value without a difference is the value '
        "with which the other values are compared: the runs of the comparison. For images per group it has runs of its "
        "own, with as many slots. Differences whose 95 % interval excludes 0 are bold, without a correction for their "
        "number.</p>"
    )
    return note + _scroll(lines)


def order_table(found: Sequence[Condition]) -> str:
    """Makes the table of conditions by one measure in HTML. Clear differences are bold."""
    measure = MEASURES[found[0].measure]
    titles = ("condition", "value", *map(order_title, ORDERS))
    lines = ["<table><thead><tr>", *(f"<th>{title}</th>" for title in titles), "</tr></thead><tbody>"]
    before = ""
    for condition in found:
        cells = [f"<th>{escape(condition.title if condition.title != before else '')}</th><td>{condition.value}</td>"]
        for pair in ORDERS:
            value = condition.differences.get(pair)
            clear = " class=clear" if value is not None and value.is_clear() else ""
            text = "" if value is None else value.text(measure.form, measure.scale).replace("±", " ±")
            cells.append(f"<td{clear}>{text}</td>")
        lines.append(f"<tr{' class=first' if condition.title != before else ''}>{''.join(cells)}</tr>")
        before = condition.title
    note = (
        f'<p class="note">Differences of {measure.name} in {measure.unit}, seed by seed, ± the standard error of the '
        f"mean, at K = 1. A {'positive' if measure.sign > 0 else 'negative'} difference is the paper's order. "
        "Differences whose 95 % interval excludes 0 are bold, without a correction for the number of differences. A "
        "difference without ± has one seed. A cell is empty if a router of its pair has no runs under the condition. "
        "At the same capacity factor, Soft MoE may have another number of slots than a sparse router. The table of the "
        "results has these numbers.</p>"
    )
    return note + _scroll(lines)


def _bars(load: Sequence[float], color: str) -> str:
    """Draws a bar per expert in SVG. A bar above twice the even share is cut off."""
    even = math.fsum(load) / len(load) or 1.0
    wide, high = max(2, min(9, 180 // len(load))), 28
    bars = []
    for place, value in enumerate(load):
        height = high * min(value / even / 2, 1.0) if math.isfinite(value) else 0.0
        box = f'x="{place * wide}" y="{high - height:.1f}" width="{wide - 1}" height="{height:.1f}"'
        bars.append(f"<rect {box}><title>{value:.2f} tokens per image</title></rect>")
    width = len(load) * wide
    line = f'<path d="M0 {high / 2}H{width}" stroke="#1c2126" stroke-width=".7" stroke-dasharray="2 2"/>'
    return (
        f'<svg width="{width}" height="{high}" fill="{color}" role="img" aria-label="load">{"".join(bars)}{line}</svg>'
    )


def _key(router: str | None) -> str:
    """Draws a dot in the colour that the router has in the figures."""
    return f'<span class="key" style="background:{style(router).color}"></span>'


def _scroll(lines: list[str]) -> str:
    """Puts the lines of a table into a box that scrolls if the window is too narrow."""
    return "\n".join(['<div class="scroll">', *lines, "</tbody></table></div>"])
