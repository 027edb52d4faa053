"""Writes docs/study_results.md from the kept records of a study: python scripts/study_page.py [RESULTS].

Every number of the page is computed here from the records. RESULTS is a folder that `vmoe-routers study` wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vmoe_routers.study import ablation_rows, decide, read_runs, summarise
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.claims import CLAIMS, Comparison, remarks, scale_of, text_of, verdicts
from vmoe_routers.study.folders import read_contents
from vmoe_routers.study.orders import ORDERS, conditions, order_sentences, order_title
from vmoe_routers.study.summary import MEASURES, Row, Run, Stat
from vmoe_routers.study.variants import base_variant

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "2026-11-29-fashion"
PAGE = ROOT / "docs" / "study_results.md"
CLAIMS_HEAD = """A claim has one or more comparisons of two models. The mean over the comparisons of a seed, tested over
all seeds, decides the claim.

- *Verdict* has the verdict on the mean, and the verdicts on the single comparisons. It holds at the 5 % level after
  Holm's correction.
- *Mean* is in points of accuracy; for claim vi it is a rank correlation. In parentheses is the 95 % interval without a
  correction.
- *Seeds*: with so many seeds, a new study resolves a true mean of this size and spread with a probability of 80 %."""


def page(folder: Path) -> str:
    """Makes the page in Markdown."""
    contents = read_contents(folder)
    runs = read_runs(folder, contents)
    planned, rows = len(set(contents["runs"])), summarise(runs)
    where = f"../results/{folder.name}"
    parts = [
        "# Results on Fashion-MNIST",
        _lead(runs, rows, planned),
        "## In short",
        _short(runs),
        "## The models with one slot per token",
        _table(rows),
        "## The claims",
        CLAIMS_HEAD,
        _claims(decide(runs)),
        f"![Mean differences of all comparisons with their 95 % intervals]({where}/forest.png)",
        "### By the loss",
        "The next table judges the same claims by the loss on the test images, in nats. A negative mean supports a "
        "claim. The loss was added as a second measure when 120 runs were finished.",
        _claims(decide(runs, "loss")),
        *remarks(runs, decide(runs), decide(runs, "loss")),
        "## Cost against accuracy",
        f"![Training time and FLOPs against accuracy and loss of all variants]({where}/figure_1.png)",
        *_ablations(runs, where),
        *_equal_losses(runs),
        *_orders(runs),
        "## Limits",
        _limits(contents["settings"], runs),
        "## Files",
        _files(folder.name),
    ]
    return "\n\n".join(parts) + "\n"


def _lead(runs: Sequence[Run], rows: Sequence[Row], planned: int) -> str:
    seeds = sorted({row.seeds for row in rows})
    count = " to ".join(dict.fromkeys(str(seed) for seed in (seeds[0], seeds[-1])))
    dates = sorted(run["date"][:10] for run in runs)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    machines = ", ".join(sorted({run["machine"]["CPU"] for run in runs}))
    comparison = sum(row.seeds for row in rows)
    if len(runs) == planned:
        finished = f"all {planned}"
    elif len(seeds) == 1 and len(runs) > comparison:  # ablations run last
        finished = (
            f"all {comparison} of the comparison, and {len(runs) - comparison} of {planned - comparison} of the "
            "ablations. **The numbers of the ablations may change.**"
        )
    else:
        finished = f"{len(runs)} of {planned}. **The numbers may change.**"
    lines = [
        "A dense ViT and the six routers were trained in the same way on Fashion-MNIST, except for the learning rate. "
        "[The study](study.md) has the protocol.",
        "",
        f"| finished runs | {finished} |",
        "|---|---|",
        f"| models | a dense ViT, and {len(rows) - 1} variants of the six routers |",
        f"| seeds per model | {count} |",
        f"| date | {when} |",
        f"| processor | {machines} |",
        "| command | `vmoe-routers study --recipe fashion` |",
    ]
    return "\n".join(lines)


def _short(runs: Sequence[Run]) -> str:
    """Says which claims are decided, and how the routers compare with equal auxiliary losses."""
    lines, decided = [], set()
    for measure in ("accuracy", "loss"):
        found = decide(runs, measure)
        for claim in CLAIMS:
            main = next((c for c in found if c.claim == claim), None)
            if main is not None and main.mean is not None and main.verdict != "not resolved":
                decided.add(claim)
                difference = format(scale_of(claim, measure) * main.mean, MEASURES[measure].form)
                unit = "" if claim == "vi" else f" {MEASURES[measure].unit}"
                lines.append(
                    f"- ({claim}) {main.verdict.capitalize()}: {text_of(claim, measure)[:-1]} ({difference}{unit})."
                )
    others = [f"({claim})" for claim in CLAIMS if claim not in decided]
    if others:
        lines.append(f"- Neither by accuracy nor by loss resolved: claims {', '.join(others)}.")
    return "\n".join([*lines, *(f"- {sentence}" for sentence in _of_equal_losses(runs))])


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "The table has the models with capacity factor 1 and K = 1. ± is the standard error over seeds.",
        "",
        "- *Minus dense* is the mean difference to the dense ViT of the same seed, in points. It is bold if its 95 % "
        "interval excludes 0.",
        "- *10-shot* is the accuracy on digits of a probe. The probe learns from frozen features of ten digits per "
        "class.",
        "- *Dropped* is the share of tokens that no expert took.",
        "- *Step* is the time of a training step, divided by the time of the dense ViT: the median over paired steps.",
        "",
        "| model | accuracy, % | minus dense | 10-shot, % | dropped, % | step, × dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.name != base_variant(row.router or "dense").name:
            continue
        cells = [
            row.label,
            row.accuracy.spaced(".2f", 100),
            _difference(row.accuracy_difference, "accuracy"),
            row.transfer.spaced(".1f", 100) if row.transfer else "-",
            "-" if row.dropped is None else f"{100 * row.dropped:.1f}",
            f"{row.step_ratio.mean:.2f}" if row.step_ratio else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _claims(found: Sequence[Comparison]) -> str:
    measure = MEASURES[found[0].measure]
    lines = ["| claim | verdict | mean | seeds |", "|---|---|---|---|"]
    counted = verdicts(found)
    for claim in CLAIMS:
        main = next((c for c in found if c.claim == claim), None)
        if main is None and measure.name != "accuracy":
            continue
        text = text_of(claim, measure.name)
        if main is None or main.mean is None:
            lines.append(f"| ({claim}) {text} | {counted[claim]} | | |")
            continue
        scale, form = scale_of(claim, measure.name), measure.form
        interval = ""
        if main.low is not None and main.high is not None:
            interval = f" ({scale * main.low:{form}} to {scale * main.high:{form}})"
        seeds = "-" if main.p is None else main.needed or "over 1,000"
        lines.append(f"| ({claim}) {text} | {counted[claim]} | {scale * main.mean:{form}}{interval} | {seeds} |")
    return "\n".join(lines)


def _ablations(runs: Sequence[Run], where: str) -> list[str]:
    rows = [row for row in ablation_rows(runs) if row.difference is not None]
    if not rows:
        return []
    clear = [row for row in rows if any(value and value.is_clear() for value in (row.difference, row.loss_difference))]
    lines = [
        "An ablation changes one setting of a model with capacity factor 1 and K = 1. The runs with the changed "
        f"setting are compared with the runs without the change, seed by seed. {len(rows)} values were compared.",
    ]
    picture = f"![Accuracy for the values of every ablation]({where}/ablations.png)"
    if not clear:
        return ["## Ablations", *lines, "No difference is clear (95 %) with the seeds so far.", picture]
    lines += [
        "",
        f"The table has the {len(clear)} values with a clear difference of the accuracy or the loss. A clear "
        "difference is bold: its 95 % interval excludes 0, without a correction for the number of differences.",
        "",
        "| setting | router | value | accuracy, points | loss, nats |",
        "|---|---|---|---|---|",
    ]
    for row in clear:
        cells = [ABLATIONS[row.ablation].title, row.label, row.arm]
        cells += [_difference(row.difference, "accuracy"), _difference(row.loss_difference, "loss")]
        lines.append(f"| {' | '.join(cells)} |")
    return ["## Ablations", "\n".join(lines), picture]


def _difference(value: Stat | None, measure: str) -> str:
    """Formats a difference. It is bold if its interval excludes 0."""
    if value is None:
        return ""
    text = value.spaced(MEASURES[measure].form, MEASURES[measure].scale)
    return f"**{text}**" if value.is_clear() else text


_EQUAL = (  # auxiliary loss of both routers, and the condition that has it
    ("0", "auxiliary loss of Token Choice", "0"),
    ("0.005", "auxiliary loss of Expert Choice", "0.005"),
    ("0.05", "auxiliary loss of both routers", "0.05"),
)
_PAIR = ("softmax_expert_choice", "softmax_token_choice")


def _at_equal_losses(runs: Sequence[Run], measure: Literal["accuracy", "loss"]) -> dict[str, Stat]:
    """Returns Softmax Expert Choice minus Softmax Token Choice by the weight of the auxiliary loss of both."""
    found = {(of.title, of.value): of.differences for of in conditions(runs, measure)}
    return {value: found[title, arm][_PAIR] for value, title, arm in _EQUAL if _PAIR in found.get((title, arm), {})}


def _of_equal_losses(runs: Sequence[Run]) -> list[str]:
    by_accuracy = _at_equal_losses(runs, "accuracy")
    if not by_accuracy:
        return []
    seeds = min(value.count for value in by_accuracy.values())
    shown = ", ".join(f"{_difference(value, 'accuracy')} at {weight}" for weight, value in by_accuracy.items())
    return [
        "By default, Softmax Token Choice has an auxiliary loss (weight 0.005), and Softmax Expert Choice has none. "
        f"With equal auxiliary losses, the accuracy of Softmax Expert Choice minus Softmax Token Choice is {shown} "
        f"(points; {'one seed' if seeds == 1 else f'{seeds} seeds'}; bold: the 95 % interval excludes 0)."
    ]


def _equal_losses(runs: Sequence[Run]) -> list[str]:
    by_accuracy, by_loss = _at_equal_losses(runs, "accuracy"), _at_equal_losses(runs, "loss")
    if not by_accuracy:
        return []
    lines = [
        *_of_equal_losses(runs),
        "",
        "| weight of both auxiliary losses | accuracy, points | loss, nats |",
        "|---|---|---|",
    ]
    for weight, value in by_accuracy.items():
        lines.append(f"| {weight} | {_difference(value, 'accuracy')} | {_difference(by_loss[weight], 'loss')} |")
    return ["### Softmax Expert Choice and Softmax Token Choice with equal auxiliary losses", "\n".join(lines)]


def _orders(runs: Sequence[Run]) -> list[str]:
    found, by_loss = conditions(runs), conditions(runs, "loss")
    lines = [
        "In the paper's abstract, Expert Choice is ahead of Token Choice, and Soft MoE is ahead of the sparse routers. "
        "The lists count the conditions under which these routers are in this order. *Clearly* means that the 95 % "
        "interval of the difference excludes 0, without a correction for the number of differences. All conditions "
        "count alike, also small differences and differences of one seed (without ±). At an equal capacity factor, "
        "Soft MoE may have more slots than a sparse router, because it rounds its slots for each image.",
        "",
        "By the accuracy:",
        "",
        *(f"- {sentence}" for sentence in order_sentences(found)),
        "",
        "By the loss (`orders.csv` has the differences):",
        "",
        *(f"- {sentence}" for sentence in order_sentences(by_loss)),
        "",
        "The table has the mean differences of accuracy over seeds, in points, ± the standard error. Clear differences "
        "are bold.",
        "",
        f"| condition | value | {' | '.join(map(order_title, ORDERS))} |",
        "|---" * (2 + len(ORDERS)) + "|",
    ]
    for condition in found:
        cells = [condition.title, condition.value]
        cells += [_difference(condition.differences.get(pair), "accuracy") for pair in ORDERS]
        lines.append(f"| {' | '.join(cells)} |")
    return ["## Where the paper's order appears", "\n".join(lines)] if found else []


def _files(name: str) -> str:
    lines = [
        f"`results/{name}` has these files:",
        "",
        "- `report.html`: the report, one file with all figures;",
        "- CSV files with all numbers, and the figures;",
        "- `runs/`: one record per run.",
        "",
        f"`vmoe-routers study --report results/{name}` makes the report from the records. `python "
        "scripts/study_page.py` makes this page.",
    ]
    return "\n".join(lines)


def _limits(settings: dict, runs: Sequence[Run]) -> str:
    images = f"{settings['epochs']} epoch{'s' if settings['epochs'] > 1 else ''}"
    lines = [
        f"- The models are small: {settings['depth']} blocks of width {settings['width']}, with "
        f"{settings['num_experts']} experts in each block of the last half.",
        f"- The models see grey images of 28 x 28 pixels for {images}. The paper trains on JFT and ImageNet. A router "
        "that is ahead here may be behind on these data sets.",
        "- Softmax Token Choice has an auxiliary loss by default, and the other five routers have none. A difference "
        "to Softmax Token Choice is also a difference of auxiliary losses.",
        "- Intervals show how much a difference changes with the seed. All seeds have the same images.",
        "- The learning rates come from a search with one seed: three values for a router, four for the dense ViT.",
        "- The times are for this processor and these CPU kernels.",
    ]
    diverged = sum(run["diverged"] is not None for run in runs)
    if diverged:
        lines.append(f"- {diverged} runs diverged. The means include these runs.")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else RESULTS))
