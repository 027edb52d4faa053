"""page: a self-contained HTML page of recorded routings."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from vmoe_routers.inspect.trace import HEADERS, Trace, as_text

SCALE = 0.75  # CSS pixels per pixel of a picture; screens have up to two physical pixels per CSS pixel

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; overflow-wrap: anywhere; }
p { margin: 0.3rem 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: pre-line; }
th { vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0; max-width: 100%; } img { max-width: 100%; height: auto; }
figcaption { font-size: 0.85rem; color: #555; overflow-wrap: anywhere; }
dt { font-weight: 600; } dd { margin: 0 0 0.5rem 1rem; }
"""

_TERMS = {
    "expert of a patch": "The expert with the largest weight in the output of the patch. A stronger colour is a larger "
    "weight; the palest colour is the weight 1/E, no preference. The image is visible below, in grey. "
    "A cross marks a dropped patch: no expert took it, and only the residual connection carries it on.",
    "slots used": "Share of the experts' slots that hold a token.",
    "dropped": "Share of patches that no expert took.",
    "requests dropped": "Share of requests that found no slot. A patch makes one request per expert that it chooses.",
    "dead experts": "Number of experts that got no token of any image.",
    "load, load cv": "Load: tokens per image in the slots of an expert; for Soft MoE, the sum of the tokens' weights "
    "of the expert. Load cv: its standard deviation over the experts, divided by the mean; 0 is balance.",
    "entropy": "Entropy of the gates of a token over the experts, in nats. 0: the router is sure; log E: it has no "
    "preference.",
    "agreement": "Normalised mutual information of the experts in this layer and in the MoE layer before. 0: "
    "unrelated; 1: one determines the other.",
    "slots, slots alike": "Soft MoE: a slot is a weighted mean of all patches. Slots alike: the mean cosine similarity "
    "of the weights of two slots. Near 1, all slots are the mean patch, and all experts see the same.",
    "plan, token error, expert error": "Sinkhorn and sparse transport: every token should have the sum 1, and every "
    "expert the same sum. The errors are the largest deviations, relative to these sums.",
}
"""Explanations of pictures and of columns. If a term has a column, the last name in the term is the column's."""


class Section(NamedTuple):
    """Part of the page: PNG files under a title, with a caption each."""

    title: str
    files: Mapping[Path, str]


def page(about: Sequence[str], trace: Trace, sections: Sequence[Section]) -> str:
    """Makes the page: lines about the model, the table of the layers, the pictures, and an explanation of the terms."""
    parts = [f"<p>{escape(line)}</p>" for line in about]
    parts += ["<h2>Layers</h2>", _table(trace)]
    for section in sections:
        parts.append(f'<h2>{escape(section.title)}</h2>\n<div class="pictures">')
        parts += [_figure(path, caption) for path, caption in section.files.items()]
        parts.append("</div>")
    terms = "".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in _terms(trace).items())
    parts += ["<h2>How to read the pictures</h2>", f"<dl>{terms}</dl>"]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Routing of {escape(about[0].removeprefix('Model: '))}</title>\n<style>{_STYLE}</style>\n</head>\n"
        "<body>\n<h1>Routing</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _terms(trace: Trace) -> dict[str, str]:
    """Returns the explanations of the pictures and columns that the page has."""
    headers = {*HEADERS.values()} - {*trace.columns()}
    absent = {header.replace("-\n", "").replace("\n", " ") for header in headers}
    return {term: text for term, text in _TERMS.items() if term.split(", ")[-1] not in absent}


def _table(trace: Trace) -> str:
    shown = trace.columns()
    head = "".join(f"<th>{escape(name)}</th>" for name in shown)
    rows = zip(*shown.values(), strict=True)
    body = "".join(f"<tr>{''.join(f'<td>{escape(as_text(value))}</td>' for value in row)}</tr>\n" for row in rows)
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}</table></div>'


def _figure(path: Path, caption: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    width = int.from_bytes(path.read_bytes()[16:20], "big")  # from the header of the PNG file
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}" width="{round(width * SCALE)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"
