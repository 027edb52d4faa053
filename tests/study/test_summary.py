"""The study's table: means, paired differences, order, and its three formats."""

import csv
import dataclasses
import io
import random

import numpy as np
import pytest
from records import run, study, variant
from rich.console import Console

from vmoe_routers import ROUTERS
from vmoe_routers.study import columns, summary
from vmoe_routers.study.summary import summarise

SOFT = variant("soft")


def last(runs, key):
    return np.array([r["epochs"][-1][key] for r in runs])


def named(rows, name):
    return next(row for row in rows if row.name == name)


def test_means_and_standard_errors():
    runs = study(seeds=4, transfer=True)
    for row in summarise(runs):
        mine = [r for r in runs if r["variant"]["name"] == row.name]
        assert row.seeds == 4
        for value, expected in [
            (row.accuracy, last(mine, "accuracy")),
            (row.loss, last(mine, "loss")),
            (row.transfer, [r["transfer"]["accuracy"] for r in mine]),
        ]:
            assert value.mean == pytest.approx(np.mean(expected))
            assert value.error == pytest.approx(np.std(expected, ddof=1) / 2)


def test_differences_are_paired_by_seed():
    dense = [run(variant(None), seed) for seed in (0, 1, 2, 5)]
    soft = [run(SOFT, seed) for seed in (1, 2, 3, 5)]
    dense_row, row = summarise(soft[::-1] + dense)
    common = soft[0], soft[1], soft[3]
    for key, value in [("accuracy", row.accuracy_difference), ("loss", row.loss_difference)]:
        expected = last(common, key) - last(dense[1:], key)
        assert value.mean == pytest.approx(expected.mean())
        assert value.error == pytest.approx(expected.std(ddof=1) / np.sqrt(3))
    assert dense_row.accuracy_difference is None


def test_times_are_medians_over_rounds():
    dense, soft = run(variant(None)), run(SOFT)
    dense["timing"]["step_ms"] = [10.0, 10.0, 20.0, 11.0, 9.0]
    soft["timing"]["step_ms"] = [15.0, 14.0, 32.0, 99.0, 18.0]  # 1.5, 1.4, 1.6, 9, 2 times as long
    soft["steps"] = 200
    dense_row, row = summarise([dense, soft])
    assert (row.step_ms.mean, row.step_ratio.mean, row.train_seconds.mean) == (18.0, 1.6, 3.6)
    # Deviations from the median 1.6: 0.1, 0.2, 0, 7.4, 0.4.
    assert row.step_ratio.error == pytest.approx(0.2 * 1.4826 * np.sqrt(np.pi / 2 / 5))
    assert row.train_seconds.error == pytest.approx(0.2 * row.step_ms.error)
    assert dense_row.step_ratio[:2] == (1.0, 0.0)


def test_standard_error_of_a_median():
    samples = np.random.default_rng(0).normal(5, 2, (2000, 25))
    errors = [summary.median_stat(sample.tolist()).error for sample in samples]
    assert np.mean(errors) == pytest.approx(np.median(samples, axis=1).std(), rel=0.1)
    assert summary.median_stat([3.0]) == (3.0, None, 1)


def test_clear_is_a_95_percent_interval():
    assert summary.stat([1.0, 1.1, 0.9]).is_clear() and not summary.stat([1.0, 2.0, 0.1]).is_clear()
    # 4.303 standard errors for three values
    assert summary.Stat(4.31, 1.0, 3).is_clear() and not summary.Stat(-4.29, 1.0, 3).is_clear()
    assert not summary.Stat(4.31, None).is_clear()
    assert not summary.stat([0.1] * 3).is_clear() and not summary.stat([0.3 - 0.2, 0.2 - 0.1, 0.1]).is_clear()
    samples = np.random.default_rng(1).normal(0, 1, (2000, 3))
    assert np.mean([summary.stat(sample).is_clear() for sample in samples]) == pytest.approx(0.05, abs=0.015)


def test_differences_without_a_common_seed_or_dense():
    without = summarise([run(SOFT, 0)])[0]
    assert without.loss_difference is None and without.step_ratio is None and without.flops_ratio is None
    apart = summarise([run(SOFT, 0), run(variant(None), 1)])[1]
    assert apart.loss_difference is None and apart.step_ratio is not None and apart.flops_ratio is not None


def test_routing_figures_are_means_over_layers_and_seeds():
    runs = [run(SOFT, seed) for seed in range(3)]
    row = summarise([*runs, run(variant(None))])[1]
    for key in ("dropped", "load_cv", "utilisation"):
        assert getattr(row, key) == pytest.approx(np.mean([[layer[key] for layer in r["layers"]] for r in runs]))
    assert row.dead_experts == np.mean([sum(layer["dead_experts"] for layer in r["layers"]) for r in runs])
    assert row.mlp_flops_ratio == runs[0]["cost"]["mlp_flops"] / 1.0e6


def test_layers_sort_load_in_every_seed():
    runs = [run(variant("softmax_expert_choice"), seed) for seed in range(2)]
    first, second = summary.summarise_layers([*runs, run(variant(None))])
    loads = [sorted(r["layers"][0]["load"], reverse=True) for r in runs]
    assert first.load == pytest.approx(list(np.mean(loads, axis=0)))
    assert (first.block, second.block) == (2, 3)


def test_order_does_not_depend_on_the_order_of_runs():
    runs = study(seeds=2, capacities=(2.0, 0.5))
    names = [row.name for row in summarise(runs)]
    random.Random(0).shuffle(runs)
    assert [row.name for row in summarise(runs)] == names
    rows = summarise(runs)
    assert rows[0].name == "dense"
    assert list(dict.fromkeys(row.router for row in rows[1:])) == list(ROUTERS)
    sinkhorn = [(r.top_k, r.combine, r.capacity_factor) for r in rows if r.router == "sinkhorn_token_choice"]
    assert sinkhorn == [(k, combine, c) for k in (1, 2) for combine in ("softmax", "plan") for c in (0.5, 2.0)]


def test_refuses_two_runs_of_one_seed():
    with pytest.raises(ValueError, match="two runs of variant 'soft-c1' with seed 0"):
        summarise([run(SOFT), run(SOFT)])


def test_one_seed_has_no_error():
    dense, row = summarise([run(SOFT), run(variant(None))])
    assert row.loss.error is None and row.loss_difference.error is None
    by_key = {column.key: column for column in columns.COLUMNS}
    assert by_key["loss"].text(row).endswith("±-")
    assert by_key["loss_difference"].text(dense) == "-"
    assert by_key["transfer"].text(row) == "-"


def test_csv_round_trip(tmp_path):
    rows = summarise([*study(seeds=2, transfer=True), run(variant("soft", capacity=3.0))])
    columns.write_csv(rows, tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert len(read) == len(rows)
    for line, row in zip(read, rows):
        cells = {}
        for field in dataclasses.fields(row):
            value = getattr(row, field.name)
            if f"{field.name}_error" in line:
                mean, error = value[:2] if value else (None, None)
                cells |= {field.name: mean, f"{field.name}_error": error}
            else:
                cells[field.name] = value
        assert line == {key: "" if value is None else str(value) for key, value in cells.items()}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("seeds", [1, 3])
def test_printed_table_fits(width, seeds):
    rows = summarise(study(seeds=seeds, transfer=True))
    console = Console(width=width, record=True, file=io.StringIO())
    columns.print_table(rows, console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "Soft MoE" in text and f"{100 * rows[0].accuracy.mean:.1f}±" in text
    assert ("dropped" in text) == (width == 120)


def test_printed_label_is_no_markup():
    hostile = {**SOFT, "label": "[red]Soft[/blue]"}
    console = Console(width=120, record=True, file=io.StringIO())
    columns.print_table(summarise([run(hostile)]), console)
    assert "[red]Soft[/blue]" in console.export_text()
