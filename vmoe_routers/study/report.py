"""Report of the study: one HTML file that contains its pictures and loads no other file."""

from __future__ import annotations

import base64
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, cast

from vmoe_routers.files import write_whole
from vmoe_routers.study import figures
from vmoe_routers.study.ablation_rows import ablation_rows
from vmoe_routers.study.claims import decide, remarks, write_claims
from vmoe_routers.study.equal_aux_losses import equal_aux_losses, verdict_of
from vmoe_routers.study.orders import Condition, conditions, order_sentences, write_orders
from vmoe_routers.study.summary import Row, Run, by_variant, loss, paired, stat, summarise, summarise_layers
from vmoe_routers.study.tables import ablation_table, claims_table, order_table, results_table, routing_table

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 80rem; padding: 1.5rem 1.25rem 4rem; background: #fff; color: #1c2126;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 1rem 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid #d9dee3; }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p, li { max-width: 48rem; }
p.lead, figcaption, .note { color: #57606a; font-size: .9rem; }
ul { padding-left: 1.2rem; margin: .5rem 0; }
code { font: .85em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: #f3f5f7; padding: .1em .35em;
  border-radius: 3px; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .35rem 2rem; margin: .8rem 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; font-size: .9rem;
  border-bottom: 1px dotted #d9dee3; }
dl div.long { grid-column: 1 / -1; }
dl.wide { grid-template-columns: 1fr; max-width: 48rem; }
dt { color: #57606a; white-space: nowrap; }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .74rem; line-height: 1.35; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .3rem; text-align: right; vertical-align: bottom; white-space: nowrap; }
td, tbody th { vertical-align: middle; }
th:first-child, td.name { text-align: left; }
tbody th { font-weight: 500; white-space: normal; min-width: 9.5rem; }
thead th { font-weight: 600; white-space: normal; }
thead tr:last-child th { border-bottom: 1.5px solid #8b949e; }
thead th small { display: block; font-weight: 400; color: #57606a; min-height: 1.3em; }
th.group { text-align: center; font-weight: 400; color: #57606a; border-bottom: 1px solid #d9dee3; }
tbody tr { border-bottom: 1px solid #eceff2; }
th.claim { text-align: left; white-space: normal; font-weight: 400; }
tbody tr.first { border-top: 2px solid #d9dee3; }
td.clear { font-weight: 700; }
.key { display: inline-block; width: .65em; height: .65em; border-radius: 50%; margin-right: .45em; }
figure { margin: 0 0 2.4rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 48rem; margin-top: .4rem; }
svg { display: block; margin-left: auto; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  html { font-size: 11px; }
  body { max-width: none; padding: 0; font-size: 11px; }
  h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; }
  figure img { max-height: 140mm; width: auto; max-width: 100%; }
  .scroll { overflow: visible; }
  table { font-size: 7.5px; }
}
"""

NO_RUN = "No run of the comparison is finished."
ONE_SEED = "One seed does not show how much of a difference is chance. Run more seeds (--seeds) to find out."

_READING = """
<p>All models have the same trunk, data order and augmentation. Their recipe is the same except for the <em>learning
rates</em> in the list above, if it has any. Models of one seed start from the same trunk. Models differ in the layer
that replaces the MLP of some blocks. Options that no setting names have the default of the router. By default, Softmax
Token Choice is the only one of the six routers with auxiliary losses. Numbers are means over seeds after the last
epoch, ± the standard error of the mean.</p>
<ul>
<li><em>Minus dense</em> is the mean of the differences to the dense ViT, taken seed by seed, ± the standard error of
this mean. It is <b>bold</b> if its 95 % interval by Student's t excludes 0. For 3 seeds, the interval is 4.3 standard
errors to either side.</li>
<li><em>Step</em> is the median time of a training step, and <em>training</em> is this time multiplied by the number of
steps. The steps were timed apart from the trainings: all variants took turns in one process, one step per round.
<em>×dense</em> is the median over the rounds of the time divided by the time of the dense ViT. Claims at equal time
use such ratios, too. Their intervals do not include the error of the times. ± is the standard error over the
rounds.</li>
<li><em>Slots</em> are the expert inputs computed per image and MoE layer. For the dense ViT they are the tokens.</li>
<li><em>MLP FLOPs</em> are the operations of MLPs, experts and routing in a forward pass.</li>
<li><em>Dropped</em> is the share of the tokens that no expert took.</li>
<li><em>Load CV</em> is the standard deviation of the experts' load, divided by the mean load.</li>
<li><em>Used</em> is the share of the slots that held a token.</li>
</ul>
<p>The results have these limits:</p>
<ul>
<li>The models and images are small, and the trainings are short. The times are for the machine named below.</li>
<li>The study does not reproduce the results of <a href="https://arxiv.org/abs/2401.15969">the paper</a> on JFT and
ImageNet with 32 experts. A router that is ahead here may be behind on these data sets.</li>
<li>All runs have the same images. Intervals show how much a difference changes with the seed, and
not how much it changes with the images.</li>
<li>The study makes many comparisons. If models do not differ, one comparison in twenty still looks clear, on
average.</li>
<li>The results are shown whether or not they agree with the paper.</li>
</ul>
"""


def write_report(
    folder: Path | str,
    runs: Sequence[Run],
    settings: Mapping[str, Any],
    planned: int | None = None,
    chance: float | None = None,
) -> Path:
    """Writes `report.html`, and every figure of the report as a PNG and a CSV file.

    Args:
        folder: The folder to write to. It is created if it does not exist.
        runs: The records of the runs.
        settings: The study's settings by name. The key "command" is optional: the command that the user typed, by
            default the arguments of this process.
        planned: The number of runs of the whole study; by default, all are finished.
        chance: The accuracy up to which a model may have learned nothing, from `chance_accuracy`; None: not known.

    Returns:
        The report's path.
    """
    settings = dict(settings)
    command = settings.pop("command", None) or _command()
    rows = summarise(runs)
    claims, claims_by_loss = decide(runs), decide(runs, "loss")
    said = remarks(runs, claims, claims_by_loss)
    orders, orders_by_loss = conditions(runs), conditions(runs, "loss")
    equal = of_equal_aux_losses(runs, planned)
    path = Path(folder) / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_claims([*claims, *claims_by_loss], path.with_name("claims.csv"))
    write_orders([*orders, *orders_by_loss], path.with_name("orders.csv"))
    seeds = max((row.seeds for row in rows), default=0)
    body = [
        "<h1>Routers in vision mixtures of experts, head to head</h1>",
        f'<p class="lead">{_count(len(rows), "model")}, {_count(len(runs), "run")}, {_count(seeds, "seed")}'
        f"{' each' if all(row.seeds == seeds for row in rows) else ' at most'}; {escape(_dates(runs))}</p>",
        *_unfinished(len(runs), planned),
        "<h2>In short</h2>",
        _list(findings(runs, chance)),
        "<h2>What was run</h2>",
        f"<p>Command of this report: <code>{escape(str(command))}</code></p>",
        _definitions(settings),
        *_notes(settings),
        "<h2>How to read the numbers, and their limits</h2>",
        _READING,
        "<h2>The claims</h2>",
        claims_table(claims),
        "<h2>The claims, by the loss</h2>",
        claims_table(claims_by_loss),
        *([_list(said)] if said else []),
        *(["<h2>Results</h2>", results_table(rows)] if rows else []),
        "<h2>Figures</h2>",
        *(_figure(folder, drawing) for drawing in figures.draw(runs)),
        *_ablations(runs),
        *(
            ["<h2>Softmax Expert Choice and Token Choice with equal auxiliary losses</h2>", _list(equal)]
            if equal
            else []
        ),
        *_orders(orders, "Where the paper's order appears"),
        *_orders(orders_by_loss, "Where the paper's order appears, by the loss"),
        "<h2>Routing, layer by layer</h2>",
        routing_table(summarise_layers(runs)),
        "<h2>Machine and versions</h2>",
        *_machines(runs),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Routers, head to head</title><style>{_STYLE}</style></head>\n<body>\n"
    )
    page += "\n".join(body) + "\n</body></html>\n"
    write_whole(path, lambda partial: partial.write_text(page, encoding="utf-8"))
    return path


def findings(runs: Sequence[Run], chance: float | None = None) -> list[str]:
    """Writes the results as sentences that claim no more than the paired 95 % intervals allow.

    Models whose accuracy is at most `chance` come first.
    """
    every = summarise(runs)
    if not every:
        return [NO_RUN]
    rows = [row for row in every if math.isfinite(row.loss.mean)]
    if not rows:
        return ["No run has a finite loss."]
    # A mean over fewer seeds may be lower only because of its seeds.
    most = [row for row in rows if row.seeds == max(row.seeds for row in rows)]
    of = "" if len(most) == len(rows) else f" of the models with {_count(most[0].seeds, 'seed')}"
    lowest = min(most, key=lambda row: row.loss.mean)
    highest = max(most, key=lambda row: row.accuracy.mean)
    said = unlearned(rows, chance) + _diverged(runs)
    said += [
        f"Lowest mean loss{of}: {lowest.label}, {lowest.loss.spaced('.3f')}. "
        f"Highest mean accuracy: {highest.label}, {highest.accuracy.spaced('.1f', 100)} %."
    ]
    if all(row.seeds == 1 for row in rows):
        said.append(ONE_SEED)
    else:
        said += _compare(runs, rows, lowest)
    steps = sorted((row.step_ratio, row.label) for row in rows if row.router and row.step_ratio)
    if steps:
        (first, first_label), (last, last_label) = steps[0], steps[-1]
        said.append(
            f"A training step took from {first.spaced('.2f')} times the dense ViT's ({first_label}) "
            f"to {last.spaced('.2f')} times ({last_label})."
        )
    return said


def of_equal_aux_losses(runs: Sequence[Run], planned: int | None = None) -> list[str]:
    """Writes how Softmax Expert Choice and Token Choice compare with equal auxiliary losses.

    A study that is not finished has no test: repeated tests of a growing study find differences that do not exist.
    """
    found = equal_aux_losses(runs)
    if found is None:
        return []
    if planned is not None and len(runs) < planned:
        return ["The test with equal auxiliary losses is made when all runs are finished."]
    return [verdict_of(found), "These p-values are valid only if the test was fixed before the runs."]


def unlearned(rows: Sequence[Row], chance: float | None) -> list[str]:
    """Names the models whose mean accuracy is at most `chance`."""
    found = [row.label for row in rows if chance is not None and row.accuracy.mean <= chance]
    if not found:
        return []
    which = "any model" if len(found) == len(rows) else _some(found)
    return [
        f"Nothing was learned by {which}: the accuracy is not clearly above the accuracy of a model that always "
        f"answers the most frequent class ({100 * cast(float, chance):.1f} % or less). Differences between such models "
        "mean nothing. Train longer (--epochs), or with another --learning-rate."
    ]


def _diverged(runs: Sequence[Run]) -> list[str]:
    """Names the runs that diverged. Their final values are from the model at its last step."""
    found = [f"{run['variant']['label']}, seed {run['seed']}" for run in runs if run["diverged"]]
    return [f"Diverged: {'; '.join(found)}. These runs are part of the means."] if found else []


def _compare(runs: Sequence[Run], rows: list[Row], lowest: Row) -> list[str]:
    """Writes sentences about losses that clearly differ from the lowest loss and from the loss of the dense ViT."""
    groups = {group[0]["variant"]["name"]: group for group in by_variant(runs)}
    differences = {row.label: paired(groups[row.name], groups[lowest.name], loss) for row in rows if row is not lowest}
    close = [label for label, values in differences.items() if not (values and stat(values).is_clear())]
    said = []
    if differences:
        said.append(f"Not clearly above the lowest loss at 95 %, seed by seed: {_some(close)}.")
    against = {row.label: row.loss_difference for row in rows if row.loss_difference is not None}
    if against:
        clear = {label: value.mean for label, value in against.items() if value.is_clear()}
        below = _some([label for label, mean in clear.items() if mean < 0])
        above = _some([label for label, mean in clear.items() if mean > 0])
        said.append(f"Loss clearly below the dense ViT's, at 95 %: {below}. Above it: {above}.")
        said.append(f"Not resolved against the dense ViT: {len(against) - len(clear)} of {len(against)}.")
    return said


def _some(labels: Sequence[str], most: int = 6) -> str:
    """Lists at most the first `most` labels. Labels contain commas, so semicolons separate them."""
    rest = f" and {len(labels) - most} more" if len(labels) > most else ""
    return "; ".join(labels[:most]) + rest or "none"


def _command() -> str:
    """Returns the command that the user typed."""
    name = Path(sys.argv[0]).name
    program = ["python", "-m", "vmoe_routers"] if name == "__main__.py" else [name]
    return shlex.join([*program, *sys.argv[1:]])


def _unfinished(finished: int, planned: int | None) -> list[str]:
    """Writes how many runs of the study are finished, unless all are."""
    if planned is None or finished >= planned:
        return []
    return [f"<p><b>{finished} of {planned} runs are finished.</b> The remaining runs may change the numbers.</p>"]


def _notes(settings: Mapping[str, Any]) -> list[str]:
    """Writes a paragraph for each setting that differs from usual models and changes how to read the results."""
    held_out = f"{settings.get('holdout') or 0:,} held-out training images"
    if not settings.get("holdout"):
        measured = "All numbers are from the test images."
    elif settings.get("choosing"):
        measured = f"All numbers are from {held_out}."
    else:
        measured = (
            "Final values are from the test images, which were measured once, after the last epoch of a run. "
            f"Curves are from {held_out}."
        )
    notes = [f"<p>{measured}</p>"]
    if settings.get("mlp_ratio", 4) != 4:
        notes.append(
            f"<p>The hidden width of the MLPs and experts is {_words(settings['mlp_ratio'])} times the width of a "
            "token; usual is 4. Narrow experts make the study shorter. They contribute less than usual experts, and "
            "routing takes a larger part of a step than in a usual model.</p>"
        )
    return notes


def _dates(runs: Sequence[Run]) -> str:
    """Returns the dates of the first and the last run."""
    dates = sorted({run["date"] for run in runs})
    return " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "nothing was run"


def _ablations(runs: Sequence[Run]) -> list[str]:
    rows = ablation_rows(runs)
    return ["<h2>Ablations</h2>", ablation_table(rows)] if rows else []


def _orders(found: Sequence[Condition], title: str) -> list[str]:
    if not found:
        return []
    return [f"<h2>{title}</h2>", _list(order_sentences(found)), order_table(found)]


def _machines(runs: Sequence[Run]) -> list[str]:
    """Lists the machines of the runs and of the timing, with dates."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps(run["machine"]), []).append(run)
    parts = []
    for machine, of in found.items():
        parts.append(f"<p>{_count(len(of), 'run')}, {escape(_dates(of))}</p>")
        parts.append(_definitions(json.loads(machine), "wide"))
    timings = {json.dumps(run["timing"]["machine"]): run["timing"]["date"] for run in runs if "timing" in run}
    for machine, date in timings.items():
        timed = (run for run in runs if "timing" in run and json.dumps(run["timing"]["machine"]) == machine)
        later = sum(run["date"] > date for run in timed)
        before = f", before {_count(later, 'run')} of the comparison ended" if later else ""
        parts.append(f"<p>Steps timed {escape(date)}{before}{'' if machine in found else ', on another machine'}</p>")
        if machine not in found:
            parts.append(_definitions(json.loads(machine), "wide"))
    return parts


def _figure(folder: Path | str, drawing: figures.Drawing) -> str:
    """Makes HTML that contains the picture of a figure. Also saves the files of the figure to the report's folder."""
    path = figures.save(folder, drawing.name, drawing.figure, drawing.data)
    data = base64.b64encode(path.read_bytes()).decode()
    title = escape(drawing.title)
    width = round(96 * drawing.figure.get_figwidth())  # CSS has 96 pixels per inch
    picture = f'<img alt="{title}" width="{width}" src="data:image/png;base64,{data}">'
    return f"<figure><h3>{title}</h3>{picture}<figcaption>{escape(drawing.caption)}</figcaption></figure>"


def _definitions(values: Mapping[str, Any], kind: str = "") -> str:
    items = []
    for key, value in values.items():
        words = _words(value)
        long = ' class="long"' if len(words) > 24 else ""
        items.append(f"<div{long}><dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(words)}</dd></div>")
    return f'<dl class="{kind}">{"".join(items)}</dl>'


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _words(value: Any) -> str:
    """Formats the value of a setting for readers."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "none"
    return str(value)
