"""Writes docs/study_results.md from the kept records of a study: python scripts/study_page.py [RESULTS].

Every number of the page is computed here from the records. RESULTS is a folder that `vmoe-routers study` wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from vmoe_routers.study import ablation_rows, decide, read_runs, summarise
from vmoe_routers.study.ablation_rows import ablation_groups
from vmoe_routers.study.ablations import ABLATIONS
from vmoe_routers.study.claims import CLAIMS, deciding, remarks, scale_of, text_of, verdicts
from vmoe_routers.study.comparisons import MOST_SEEDS, POWER, Comparison
from vmoe_routers.study.equal_aux_losses import EqualAuxLosses, equal_aux_losses, verdict_of
from vmoe_routers.study.folders import read_contents
from vmoe_routers.study.orders import ORDERS, Condition, conditions, order_sentences, order_title
from vmoe_routers.study.styles import style
from vmoe_routers.study.summary import MEASURES, Row, Run, Stat, by_variant, paired, stat
from vmoe_routers.study.variants import base_variant

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "2026-11-29-fashion"
REPLICATION = ROOT / "results" / "2026-11-29-fashion_equal_aux_losses"
PAGE = ROOT / "docs" / "study_results.md"
CLAIMS_HEAD = """A claim has one or more comparisons of two models. The mean over the comparisons of a seed, tested over
all seeds, decides the claim.

- *Verdict* has the verdict on the mean, and the verdicts on the single comparisons. It holds at the 5 % level after
  Holm's correction.
- *Mean* is in points of accuracy; for claim vi it is a rank correlation. In parentheses is the 95 % interval without a
  correction.
- *Seeds* is the number of seeds with which a new study resolves a true mean of this size and spread with a probability
  of {power:g} %, at the 5 % level divided by the number of claims. Size and spread are estimates from the seeds of this
  study."""


def page(folder: Path) -> str:
    """Makes the page in Markdown."""
    contents = read_contents(folder)
    runs = read_runs(folder, contents)
    planned, rows = len(set(contents["runs"])), summarise(runs)
    claims, claims_by_loss = decide(runs), decide(runs, "loss")
    orders, orders_by_loss = conditions(runs), conditions(runs, "loss")
    equal = equal_aux_losses(runs)
    others = _replication() if folder == RESULTS else []
    replication = equal_aux_losses(others)
    where = f"../results/{folder.name}"
    parts = [
        "# Results on Fashion-MNIST",
        _lead(runs, rows, planned),
        "## In short",
        "\n".join([_short(rows, claims, claims_by_loss, equal, replication), *_of_ablations(runs)]),
        "## The models with capacity factor 1",
        _table(rows),
        "## The claims",
        CLAIMS_HEAD.format(power=100 * POWER),
        _claims(claims),
        "### By the loss",
        "The next table judges the same claims by the loss on the test images, in nats. A negative mean supports a "
        "claim. The loss was added as a second measure when 120 runs were finished.",
        _claims(claims_by_loss),
        f"![Mean differences in accuracy and loss of all comparisons, with their 95 % intervals]({where}/forest.png)",
        "Bars are 95 % intervals without a correction. A filled mark is decided after the correction. A mark on the "
        "right of 0 supports the claim by both measures.",
        *remarks(runs, claims, claims_by_loss),
        "## Cost against accuracy",
        f"![Training time and FLOPs against accuracy and loss of all variants]({where}/figure_1.png)",
        "Bars are standard errors. Thin lines join the capacity factors of a router. No model is both cheaper and "
        "better than a model on the dashed line. The table above has medians of paired ratios of the step times. The "
        "picture has the median times, so a small difference in time can have another sign there.",
        *_ablations(runs, where),
        *_minus_dense(runs),
        *_equal_losses(equal, runs, replication, others),
        *_orders(orders, orders_by_loss),
        "## Limits",
        _limits(contents["settings"], runs),
        "## Files",
        _files(folder.name),
    ]
    return "\n\n".join(parts) + "\n"


def _replication() -> Sequence[Run]:
    """Reads the records of the replication of docs/study.md. Returns an empty list before all runs are finished."""
    if not REPLICATION.is_dir():
        return []
    contents = read_contents(REPLICATION)
    runs = read_runs(REPLICATION, contents)
    return runs if len(runs) == len(set(contents["runs"])) else []


def _lead(runs: Sequence[Run], rows: Sequence[Row], planned: int) -> str:
    seeds = sorted({row.seeds for row in rows})
    count = " to ".join(dict.fromkeys(str(seed) for seed in (seeds[0], seeds[-1])))
    dates = sorted(run["date"][:10] for run in runs)
    when = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    machines = ", ".join(sorted({run["machine"]["CPU"] for run in runs}))
    comparison = sum(row.seeds for row in rows)
    of_ablations = max((row.seeds for row in ablation_rows(runs)), default=0)
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
        "A dense ViT and the six routers were trained on Fashion-MNIST with the same images, steps and optimiser. The "
        "dense ViT has another learning rate than the routers. Options of the routers have their defaults, except for "
        "the initial scale of Soft MoE ([limits](#limits)). [The study](study.md) has the protocol.",
        "",
        f"| finished runs | {finished} |",
        "|---|---|",
        f"| models | a dense ViT, and {len(rows) - 1} variants of the six routers |",
        f"| seeds per model | {count}{f'; at most {of_ablations} in an ablation' if of_ablations else ''} |",
        f"| date | {when} |",
        f"| processor | {machines} |",
        "| command | `vmoe-routers study --recipe fashion` |",
    ]
    return "\n".join(lines)


def _short(
    rows: Sequence[Row],
    claims: Sequence[Comparison],
    claims_by_loss: Sequence[Comparison],
    equal: EqualAuxLosses | None,
    replication: EqualAuxLosses | None,
) -> str:
    """Says which claims are decided, and how two routers compare with equal weights of the auxiliary losses."""
    lines, open_claims = [], []
    mains = deciding(claims), deciding(claims_by_loss)
    for claim in CLAIMS:
        judged = [of[claim] for of in mains if claim in of and of[claim].mean is not None]
        decided = [main for main in judged if main.verdict != "not resolved"]
        for main in decided:
            difference = format(scale_of(claim, main.measure) * main.mean, MEASURES[main.measure].form)
            unit = "" if claim == "vi" else f" {MEASURES[main.measure].unit}"
            lines.append(
                f'- Claim ({claim}) is **{main.verdict}** by the {main.measure}: "{text_of(claim, main.measure)}" The '
                f"mean difference is {difference}{unit}.{_against(main, [*claims, *claims_by_loss])}"
            )
        if judged and not decided:
            open_claims.append(f"    - ({claim}) {CLAIMS[claim]}")
    if open_claims:
        lines += ["- These claims are resolved by no measure:", *open_claims]
    lowest, highest = min(rows, key=lambda row: row.loss.mean), max(rows, key=lambda row: row.accuracy.mean)
    lines.append(
        f"- {lowest.label} has the lowest mean loss ({lowest.loss.spaced('.3f')}) of all {len(rows)} models of the "
        f"comparison, and {highest.label} has the highest mean accuracy ({highest.accuracy.spaced('.1f', 100)} %)."
    )
    lines += [f"- {sentence}" for sentence in remarks([], claims, claims_by_loss)]
    lines.append("- The loss was added as a second measure after results were seen ([protocol](study.md#claims)).")
    if equal:
        shown = {
            measure: ", ".join(f"{_difference(value, measure)} (weight {weight})" for weight, value in of.items())
            for measure, of in equal.differences.items()
        }
        lines.append(
            "- By default, Softmax Token Choice has two auxiliary losses (importance and load, weight 0.005 each), and "
            "Softmax Expert Choice has none. With equal weights in both routers, at capacity factor 1, Softmax Expert "
            f"Choice minus Softmax Token Choice is {shown['accuracy']} in points of accuracy, and {shown['loss']} in "
            "nats of loss. A difference is bold if its 95 % interval excludes 0, without a correction. This comparison "
            "was added after results were seen, and is no claim."
        )
        expert, token = (
            ", ".join(f"{_percent(of[place])} % (weight {weight})" for weight, of in equal.dropped.items())
            for place in (0, 1)
        )
        lines.append(
            f"- The share of tokens that no expert takes is {expert} in Softmax Expert Choice, and {token} in Softmax "
            "Token Choice."
        )
    if replication:
        lines.append(
            f"- The comparison at equal weights was repeated with other seeds. {verdict_of(replication)} The test was "
            "fixed before its runs ([replication](study.md#replication))."
        )
    return "\n".join(lines)


def _against(main: Comparison, of: Sequence[Comparison]) -> str:
    """Names the single comparisons of a decided claim that have the other sign, and an interval without 0."""
    measure, words = MEASURES[main.measure], []
    for one in of:
        if (one.claim, one.measure) != (main.claim, main.measure):
            continue
        if one.low is not None and one.low * one.high > 0 > one.mean * main.mean:
            mean, low, high = (format(measure.scale * value, measure.form) for value in (one.mean, one.low, one.high))
            words.append(f"{one.what} is {mean} ({low} to {high})")
    return f" With the other sign, without a correction: {'; '.join(words)}." if words else ""


def _of_ablations(runs: Sequence[Run]) -> list[str]:
    """Names the best model of the ablations with the trainings of the comparison, and the models with most epochs."""
    rows = [row for row in ablation_rows(runs) if row.ablation != "epochs" and not row.is_base]
    if not rows:
        return []
    best = max(rows, key=lambda row: row.accuracy.mean)
    lines = [
        f"- {best.label} with the value {best.arm} of *{ABLATIONS[best.ablation].title}* has the highest mean accuracy "
        f"({best.accuracy.spaced('.1f', 100)} %) of the ablations with equal epochs. The largest tested weight of "
        "the auxiliary losses is 0.05, so the best weight is not known.",
    ]
    by_epochs = _epochs_minus_dense(runs)
    if by_epochs:
        epochs = max(by_epochs, key=int)
        words = [
            f"{style(router).title} {_difference(accuracy, 'accuracy')} points and {_difference(loss, 'loss')} nats"
            for router, (accuracy, loss) in by_epochs[epochs].items()
        ]
        lines.append(
            f"- Claim (i) is tested after {runs[0]['settings']['epochs']} epoch. After {epochs} epochs, the "
            "differences to the dense ViT are ([table](#routers-minus-the-dense-vit-by-epochs)): "
            f"{'; '.join(words)}. A difference is bold if its 95 % interval excludes 0, without a correction."
        )
    return lines


def _epochs_minus_dense(runs: Sequence[Run]) -> dict[str, dict[str, tuple[Stat, Stat]]]:
    """Finds each router minus the dense ViT in accuracy and loss, by the number of epochs."""
    groups = {
        (group.arm.label, group.router): group.runs for group in ablation_groups(runs) if group.ablation == "epochs"
    }
    found: dict[str, dict[str, tuple[Stat, Stat]]] = {}
    for (epochs, router), of in groups.items():
        differences = [paired(of, groups.get((epochs, None), []), measure.of) for measure in MEASURES.values()]
        if router is not None and differences[0]:
            found.setdefault(epochs, {})[router] = stat(differences[0]), stat(differences[1])
    return found


def _minus_dense(runs: Sequence[Run]) -> list[str]:
    found = _epochs_minus_dense(runs)
    if not found:
        return []
    lines = [
        "The table has the mean differences to the dense ViT with the same number of epochs, at capacity factor 1 and "
        "K = 1, and not at equal FLOPs. A difference is bold if its 95 % interval excludes 0, without a correction. "
        "The learning rates were chosen with 2 epochs.",
        "",
        "| epochs | router | seeds | accuracy, points | loss, nats |",
        "|---|---|---|---|---|",
    ]
    for epochs in sorted(found, key=int):
        for router, (accuracy, loss) in found[epochs].items():
            cells = [epochs, style(router).title, str(accuracy.count)]
            cells += [_difference(accuracy, "accuracy"), _difference(loss, "loss")]
            lines.append(f"| {' | '.join(cells)} |")
    return ["### Routers minus the dense ViT, by epochs", "\n".join(lines)]


def _table(rows: Sequence[Row]) -> str:
    lines = [
        "The table has the models with K = 1. ± is the standard error over seeds.",
        "",
        "- *Minus dense* is the mean difference to the dense ViT of the same seed, in points. It is bold if its 95 % "
        "interval excludes 0.",
        "- *10-shot* is the accuracy of a probe on images of digits. The probe learns from frozen features of ten "
        "images per class.",
        "- *Slots* are the expert inputs per image and MoE layer. For the dense ViT they are the tokens.",
        "- *Dropped* is the share of tokens that no expert took.",
        "- *Step* is the time of a training step, divided by the time of the dense ViT: the median over paired steps, "
        "± its standard error. The times of another day may differ by more than this error.",
        "",
        "| model | accuracy, % | minus dense | 10-shot, % | slots | dropped, % | step, × dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.name != base_variant(row.router or "dense").name:
            continue
        cells = [
            row.label,
            row.accuracy.spaced(".2f", 100),
            _difference(row.accuracy_difference, "accuracy"),
            row.transfer.spaced(".1f", 100) if row.transfer else "-",
            f"{row.slots:g}",
            _percent(row.dropped),
            row.step_ratio.spaced(".2f") if row.step_ratio and row.router else "1" if row.step_ratio else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _claims(found: Sequence[Comparison]) -> str:
    measure = MEASURES[found[0].measure]
    lines = ["| claim | verdict | mean | seeds |", "|---|---|---|---|"]
    counted, mains = verdicts(found), deciding(found)
    for claim in CLAIMS:
        main = mains.get(claim)
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
        seeds = "-" if main.p is None else main.needed or f"over {MOST_SEEDS:,}"
        lines.append(f"| ({claim}) {text} | {counted[claim]} | {scale * main.mean:{form}}{interval} | {seeds} |")
    return "\n".join(lines)


def _ablations(runs: Sequence[Run], where: str) -> list[str]:
    rows = [row for row in ablation_rows(runs) if row.difference is not None]
    if not rows:
        return []
    clear = [row for row in rows if any(value and value.is_clear() for value in (row.difference, row.loss_difference))]
    lines = [
        "An ablation changes one setting of a model with capacity factor 1 and K = 1. The runs with the changed "
        "setting are compared with the runs without the change, seed by seed. For images per group and experts of Soft "
        "MoE, every value has 64 slots per image, some by another capacity factor. Images per group are compared with "
        f"the value 8. {len(rows)} values were compared.",
    ]
    picture = (
        f"![Accuracy for the values of every ablation]({where}/ablations.png)\n\nHollow marks are runs of the "
        "comparison. Bars are standard errors. Panels have different scales."
    )
    if not clear:
        return ["## Ablations", *lines, "No difference is clear (95 %) with the seeds so far.", picture]
    lines += [
        "",
        f"The table has the {len(clear)} values with a clear difference of the accuracy or the loss. A clear "
        "difference is bold: its 95 % interval excludes 0, without a correction for the number of differences. With 3 "
        "seeds the interval is 4.3 standard errors to either side.",
        "",
        "| setting | router | value | seeds | accuracy, points | loss, nats | dropped, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in clear:
        cells = [ABLATIONS[row.ablation].title, row.label, row.arm, str(row.difference.count if row.difference else 0)]
        cells += [_difference(row.difference, "accuracy"), _difference(row.loss_difference, "loss")]
        cells.append(_percent(row.dropped))
        lines.append(f"| {' | '.join(cells)} |")
    return ["## Ablations", "\n".join(lines), picture]


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _difference(value: Stat | None, measure: str) -> str:
    """Formats a difference. It is bold if its interval excludes 0."""
    if value is None:
        return ""
    text = value.spaced(MEASURES[measure].form, MEASURES[measure].scale)
    return f"**{text}**" if value.is_clear() else text


def _equal_losses(
    equal: EqualAuxLosses | None, runs: Sequence[Run], replication: EqualAuxLosses | None, others: Sequence[Run]
) -> list[str]:
    """Makes the tables of Softmax Expert Choice minus Softmax Token Choice by the weights of the auxiliary losses.

    Args:
        equal, runs: The comparison at equal weights, and the runs.
        replication, others: The same of the replication.
    """
    if equal is None:
        return []
    title = "Softmax Expert Choice and Softmax Token Choice with equal weights of the auxiliary losses"
    lines = [
        "The table has Softmax Expert Choice minus Softmax Token Choice at capacity factor 1 and K = 1. The auxiliary "
        "losses are importance and load. A difference is bold if its 95 % interval excludes 0, without a correction. "
        "*Dropped* is the share of tokens that no expert took. The last row has the default weights: 0.005 in Token "
        "Choice, and 0 in Expert Choice.",
        "",
        *_weights(equal, runs),
    ]
    if replication:
        lines += [
            "",
            "The test was chosen after these results were seen, so they cannot confirm it. The comparison was repeated "
            "with other seeds. The test was fixed before these runs ([replication](study.md#replication)). "
            f"{verdict_of(replication)}",
            "",
            *_weights(replication, others),
            "",
            f"The records are in `results/{REPLICATION.name}`.",
        ]
    return [f"### {title}", "\n".join(lines)]


def _weights(equal: EqualAuxLosses, runs: Sequence[Run]) -> list[str]:
    units = [f"{measure}, {MEASURES[measure].unit}" for measure in equal.differences]
    lines = [
        f"| weight in both routers | seeds | {' | '.join(units)} | dropped by Expert Choice, % | dropped by Token "
        "Choice, % |",
        "|---" * (len(units) + 4) + "|",
    ]
    for weight, dropped in equal.dropped.items():
        cells = [weight, str(len(equal.seeds))]
        cells += [_difference(of[weight], measure) for measure, of in equal.differences.items()]
        cells += map(_percent, dropped)
        lines.append(f"| {' | '.join(cells)} |")
    rows = {row.name: row for row in summarise(runs)}
    groups = {group[0]["variant"]["name"]: group for group in by_variant(runs)}
    expert, token = (base_variant(router).name for router in ORDERS[0])
    differences = {
        measure: stat(paired(groups[expert], groups[token], MEASURES[measure].of)) for measure in equal.differences
    }
    cells = ["defaults", str(rows[expert].seeds)]
    cells += [_difference(value, measure) for measure, value in differences.items()]
    cells += [_percent(rows[name].dropped) for name in (expert, token)]
    return [*lines, f"| {' | '.join(cells)} |"]


def _orders(found: Sequence[Condition], by_loss: Sequence[Condition]) -> list[str]:
    lines = [
        "The paper's abstract says that Expert Choice generally outperforms Token Choice, and that Soft MoE generally "
        "outperforms sparse routers. The lists have four pairs of routers. They count the conditions in which the "
        "first router of a pair is better (*ahead*) or worse (*behind*). All conditions count alike, also differences "
        "near 0. Capacity factors have all seeds, ablations fewer. Many conditions share runs, so the counts are no "
        "independent evidence. *Clearly* means that the 95 % interval of the difference excludes 0, without a "
        "correction for the number of differences. At an equal capacity factor, Soft MoE may have more slots than a "
        "sparse router, because it rounds its slots for each image.",
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
        "- `runs/`: one record per run, and one of the timed steps;",
        "- `study.json`: the settings, and the names of the records.",
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
        "- Softmax Token Choice is the only router with auxiliary losses by default. A difference between Softmax "
        "Token Choice and another model is also a difference of auxiliary losses.",
        f"- The initial scale of Soft MoE is {settings['scale_init']:g}, and not the default, 1. It was chosen after a "
        "trial on Fashion-MNIST.",
        "- Intervals show how much a difference changes with the seed. All seeds have the same images.",
        "- The learning rates come from a search with one seed and two epochs, at capacity factor 1 and K = 1: three "
        "values for a router, four for the dense ViT. They were not searched again for other epochs or variants.",
        "- The times are for this processor and these CPU kernels.",
    ]
    diverged = sum(run["diverged"] is not None for run in runs)
    if diverged:
        lines.append(f"- {diverged} runs diverged. The means include these runs.")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else RESULTS))
