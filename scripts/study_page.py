"""Writes docs/study_results.md from the kept records of a study: python scripts/study_page.py [RESULTS].

Every number of the page is computed here from the records. RESULTS is a folder that `vmoe-routers study` wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vmoe_routers.study import ablation_rows, decide, read_runs, summarise
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.claims import CLAIMS, Comparison, scale_of, text_of, verdicts
from vmoe_routers.study.folders import read_contents
from vmoe_routers.study.orders import ORDERS, conditions, order_sentences, order_title
from vmoe_routers.study.summary import MEASURES, Row, Run, Stat
from vmoe_routers.study.variants import base_variant

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "2026-11-29-fashion"
PAGE = ROOT / "docs" / "study_results.md"


def page(folder: Path) -> str:
    """Makes the page in Markdown."""
    contents = read_contents(folder)
    runs = read_runs(folder, contents)
    planned, rows = len(set(contents["runs"])), summarise(runs)
    where = f"../results/{folder.name}"
    parts = [
        "# Results on Fashion-MNIST",
        _lead(runs, rows, planned),
        _table(rows),
        "## The claims",
        "The mean over the comparisons of a claim, computed for each seed, decides the claim. *Mean* is in points of "
        "accuracy, or a rank correlation for claim vi, with an uncorrected 95 % interval. Verdicts hold at the 5 % "
        "level after Holm's correction. *Seeds* is the number of seeds that would resolve the mean.",
        _claims(decide(runs)),
        f"![Mean differences of all comparisons with their 95 % intervals]({where}/forest.png)",
        "### By the loss",
        "The same claims, judged by the loss on the test images, in nats. A negative mean supports a claim. The loss "
        "was added as a second measure when 120 runs were finished.",
        _claims(decide(runs, "loss")),
        "## Cost against accuracy",
        f"![Training time and FLOPs against accuracy and loss of all variants]({where}/figure_1.png)",
        *_ablations(runs, where),
        *_orders(runs),
        "## Limits",
        _limits(contents["settings"], runs),
        "## Files",
        f"`results/{folder.name}` has the report as one HTML file (`report.html`), all numbers as CSV files, the "
        f"figures, and a record for every run. `vmoe-routers study --report results/{folder.name}` makes the report "
        "from the records, and `python scripts/study_page.py` makes this page.",
    ]
    return "\n\n".join(parts) + "\n"


def _lead(runs: Sequence[Run], rows: Sequence[Row], planned: int) -> str:
    seeds = sorted({row.seeds for row in rows})
    count = " to ".join(dict.fromkeys(str(seed) for seed in (seeds[0], seeds[-1])))
    count += " seed" if seeds[-1] == 1 else " seeds"
    dates = sorted(run["date"][:10] for run in runs)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    state = "" if len(runs) == planned else f"**{len(runs)} of {planned} runs are finished.** The numbers may change. "
    machines = ", ".join(sorted({run["machine"]["CPU"] for run in runs}))
    return (
        f"{state}A dense ViT and {len(rows) - 1} variants of the six routers were trained alike, with {count} each, on "
        f"{when} ({machines}). `vmoe-routers study --recipe fashion` repeats the study. [The study](study.md) has the "
        "protocol."
    )


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "The table is for capacity factor 1 and K = 1. ± is the standard error over seeds. *Minus dense* is the mean "
        "difference to the dense ViT of the same seed, in points. A bold difference has a 95 % interval that excludes "
        "0. *10-shot* is the accuracy of a probe on frozen features, with ten digits of each kind. *Step* is the "
        "median time of a training step.",
        "",
        "| model | accuracy, % | minus dense | 10-shot, % | dropped, % | step, × dense |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.name != base_variant(row.router or "dense").name:
            continue
        cells = [
            row.label,
            _text(row.accuracy, ".2f", 100),
            _difference(row.accuracy_difference, "accuracy"),
            _text(row.transfer, ".1f", 100) if row.transfer else "-",
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
        f"An ablation changes one setting, at capacity factor 1 and K = 1. {len(rows)} values were compared with the "
        f"runs above, seed by seed. The table has the {len(clear)} values of which a difference has a 95 % interval "
        "that excludes 0 (bold), without a correction for the number of differences.",
        "",
        "| ablation | router | value | accuracy, points | loss, nats |",
        "|---|---|---|---|---|",
    ]
    for row in clear:
        cells = [ABLATIONS[row.ablation].title, row.label, row.arm]
        cells += [_difference(row.difference, "accuracy"), _difference(row.loss_difference, "loss")]
        lines.append(f"| {' | '.join(cells)} |")
    return ["## Ablations", "\n".join(lines), f"![Accuracy for the values of every ablation]({where}/ablations.png)"]


def _text(value: Stat, form: str, scale: float) -> str:
    return value.text(form, scale).replace("±", " ± ")


def _difference(value: Stat | None, measure: str) -> str:
    """Formats a difference. It is bold if its interval excludes 0."""
    if value is None:
        return ""
    text = _text(value, MEASURES[measure].form, MEASURES[measure].scale)
    return f"**{text}**" if value.is_clear() else text


def _orders(runs: Sequence[Run]) -> list[str]:
    found, by_loss = conditions(runs), conditions(runs, "loss")
    lines = [
        "In the paper's abstract, Expert Choice is ahead of Token Choice, and Soft MoE is ahead of the sparse routers. "
        "Differences are means over seeds, in points, ± the standard error. *Clearly* means, and bold differences "
        "have, a 95 % interval that excludes 0, without a correction for the number of differences.",
        "",
        "By the accuracy:",
        "",
        *(f"- {sentence}" for sentence in order_sentences(found)),
        "",
        "By the loss (`orders.csv` has the differences):",
        "",
        *(f"- {sentence}" for sentence in order_sentences(by_loss)),
        "",
        "The differences of accuracy:",
        "",
        f"| condition | value | {' | '.join(map(order_title, ORDERS))} |",
        "|---" * (2 + len(ORDERS)) + "|",
    ]
    for condition in found:
        cells = [condition.title, condition.value]
        cells += [_difference(condition.differences.get(pair), "accuracy") for pair in ORDERS]
        lines.append(f"| {' | '.join(cells)} |")
    return ["## Where the paper's order appears", "\n".join(lines)] if found else []


def _limits(settings: dict, runs: Sequence[Run]) -> str:
    images = f"{settings['epochs']} epoch{'s' if settings['epochs'] > 1 else ''}"
    lines = [
        f"- The models are small ({settings['depth']} blocks of width {settings['width']}, {settings['num_experts']} "
        f"experts in the last half) and see grey images of 28 x 28 pixels for {images}. The paper trains on JFT and "
        "ImageNet. A router that wins here need not win there.",
        "- The learning rates come from a search with one seed: three values for a router, four for the dense ViT.",
        "- Times hold for this machine. The times depend on the CPU kernels, not on the routers alone.",
    ]
    diverged = sum(run["diverged"] is not None for run in runs)
    if diverged:
        lines.append(f"- {diverged} runs diverged. The means include these runs.")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else RESULTS))
