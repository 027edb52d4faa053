"""The study's figures: they draw the data, even if runs are missing."""

import csv

import pytest
from records import run, study, variant

from vmoe_routers.study import figures, plots
from vmoe_routers.study.claims import text_of
from vmoe_routers.study.summary import summarise


def drawn(ax, gid):
    """Returns the line with this id, as lists of x and y."""
    (line,) = [line for line in ax.lines if line.get_gid() == gid]
    return list(line.get_xdata()), list(line.get_ydata())


def test_figure_1_draws_its_data():
    runs = study(seeds=3, capacities=(0.5, 1.0))
    data, rows = figures.figure_1_data(runs), summarise(runs)
    figure = figures.figure_1(runs)
    assert [point["name"] for point in data] == [row.name for row in rows]
    for point, row in zip(data, rows):
        assert (point["loss"], point["loss_error"]) == row.loss[:2]
        assert (point["train_seconds"], point["train_seconds_error"]) == row.train_seconds[:2]
        for ax, key, scale in zip(figure.axes, ("accuracy", "loss"), (100, 1)):
            assert drawn(ax, row.name) == ([point["train_seconds"]], [point[key] * scale])
        for ax, key, scale in zip(figure.axes[2:], ("accuracy", "loss"), (100, 1)):
            assert drawn(ax, row.name) == ([point["flops"] * 1e-6], [point[key] * scale])
    assert [ax.get_xlabel() for ax in figure.axes[:2]] == ["training time (s)"] * 2
    (legend,) = figure.legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert "Sinkhorn Token Choice, K = 2, plan combine" in labels and "size: capacity factor 0.5" in labels
    assert len(labels) == len(set(labels)) == 11 + 2


def test_marker_size_goes_by_capacity():
    figure = figures.figure_1([run(variant("soft", capacity=c)) for c in (0.5, 1.0, 2.0)])
    sizes = [
        line.get_markersize()
        for name in ("soft-c0.5", "soft-c1", "soft-c2")
        for line in figure.axes[0].lines
        if line.get_gid() == name
    ]
    assert sizes == pytest.approx([sizes[1] * 0.5**0.5, sizes[1], sizes[1] * 2**0.5])


def test_figure_2_needs_transfer():
    assert figures.figure_2(study(seeds=1)) is None
    runs = [run(variant(None), transfer=True), run(variant("soft"), transfer=True), run(variant("soft"), 1)]
    data = figures.figure_2_data(runs)
    assert [(point["name"], point["seeds"]) for point in data] == [("dense", 1), ("soft-c1", 1)]
    figure = figures.figure_2(runs)
    assert drawn(figure.axes[0], "soft-c1")[1] == [100 * runs[1]["transfer"]["accuracy"]]
    assert "fashion-mnist" in figure.axes[0].get_ylabel()


@pytest.mark.parametrize("seeds", [1, 3])
def test_figure_3_draws_its_data(seeds):
    runs = study(seeds=seeds, capacities=(1.0, 2.0))
    data = figures.figure_3_data(runs)
    figure = figures.figure_3(runs)
    assert len(data) == 2 * 4 * 20 and len(figure.axes) == 4
    for place, capacity in enumerate(("c1", "c2")):
        name = f"sinkhorn_token_choice-k2-plan-{capacity}"
        points = [point for point in data if point["name"] == name]
        mine = [r for r in runs if r["variant"]["name"] == name]
        assert points[4]["loss"] == pytest.approx(sum(r["epochs"][4]["loss"] for r in mine) / seeds)
        epochs, losses = drawn(figure.axes[2 * place + 1], name)
        assert epochs == list(range(1, 21)) and losses == [point["loss"] for point in points]
    bands = [len(ax.collections) for ax in figure.axes]
    assert bands == [4 if seeds > 1 else 0] * 4


def test_figure_3_is_left_out_without_sinkhorn_token_choice():
    runs = [run(variant(router)) for router in (None, "soft", "sinkhorn_expert_choice")]
    assert figures.figure_3(runs) is None
    assert [drawing.name for drawing in figures.draw(runs)] == ["figure_1", "figure_load"]


def test_figure_3_stops_where_a_seed_does():
    sinkhorn = variant("sinkhorn_token_choice", 1, "plan")
    assert len(figures.figure_3_data([run(sinkhorn, 0, epochs=7), run(sinkhorn, 1, epochs=5)])) == 5


def test_figure_3_is_left_out_with_one_epoch():
    assert figures.figure_3([run(variant("sinkhorn_token_choice", 1), epochs=1)]) is None


def test_figure_load_shows_capacity_factor_1():
    kinds = [variant("soft", capacity=factor) for factor in (0.5, 1.0, 2.0)]
    assert {point["name"] for point in figures.figure_load_data(map(run, kinds))} == {"soft-c1"}
    assert {point["name"] for point in figures.figure_load_data([run(kinds[0])])} == {"soft-c0.5"}


def test_figure_load_draws_its_data():
    runs = study(seeds=2)
    data = figures.figure_load_data(runs)
    figure = figures.figure_load(runs)
    assert len(figure.axes) == 10
    soft = [point for point in data if point["name"] == "soft-c1" and point["block"] == 3]
    assert drawn(figure.axes[-1], "soft-c1 3") == (list(range(1, 9)), [p["relative_load"] for p in soft])
    assert sum(point["relative_load"] for point in soft) == pytest.approx(8)
    # Every column shows its ranks under its lowest panel, even if the last row is not full.
    shown = [ax.xaxis.get_major_ticks()[0].label1.get_visible() for ax in figure.axes]
    assert shown == 6 * [False] + 4 * [True]
    assert figures.figure_load([run(variant(None))]) is None


def test_copes_with_no_runs_with_nan_and_with_markup():
    assert figures.draw([]) == []
    broken = run({**variant("soft"), "label": "$\\frac{"})
    broken["epochs"][-1].update(loss=float("nan"), accuracy=float("nan"))
    for drawing in figures.draw([broken, run(variant("sinkhorn_token_choice", 3, "plan"), epochs=1)]):
        drawing.figure.draw_without_rendering()


def test_save_all_writes_pictures_and_numbers(tmp_path):
    kinds = [variant(None), variant("sinkhorn_token_choice", 2, "plan"), variant("soft")]
    runs = [run(kind, seed, transfer=kind["router"] == "soft") for kind in kinds for seed in range(2)]
    paths = figures.save_all(tmp_path / "new", runs)
    assert [path.stem for path in paths] == ["figure_1", "figure_2", "forest", "figure_3", "figure_load"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "new" / "figure_1.csv", newline="", encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    for line, point in zip(read, figures.figure_1_data(runs), strict=True):
        assert line == {key: "" if value is None else str(value) for key, value in point.items()}


def test_the_front_has_the_points_that_no_point_beats():
    points = [(2.0, 0.9), (1.0, 0.8), (3.0, 0.85), (1.0, 0.7), (4.0, 0.95), (5.0, float("nan"))]
    assert plots.front(points, "upper") == [(1.0, 0.8), (2.0, 0.9), (4.0, 0.95)]
    assert plots.front(points, "lower") == [(1.0, 0.7)]


def test_forest_draws_every_comparison_by_both_measures():
    data = figures.forest_data(study(seeds=3, transfer=True))
    panels = {ax.get_title(loc="left").replace("\n", " "): ax for ax in plots.paint_forest(data).axes}
    claims = {(point["claim"], point["measure"]) for point in data}
    assert len(panels) == len(claims) and ("vi", "loss") not in claims
    for point in data:
        claim, measure = point["claim"], point["measure"]
        ax = panels[f"({claim}) {text_of(claim, measure)}"]
        scale = 1 if claim == "vi" or measure == "loss" else 100
        x, y = drawn(ax, f"{claim}, {measure}: {point['what']}")
        assert x == [scale * point["mean"]]
        (mark,) = [line for line in ax.lines if line.get_gid() == f"{claim}, {measure}: {point['what']}"]
        assert (mark.get_markerfacecolor() == "white") == (point["verdict"] == "not resolved")
        left = panels[f"({claim}) {text_of(claim)}"]  # has the labels of the row
        assert left.get_yticklabels()[y[0]].get_text() == point["what"] and ax.get_ylim() == left.get_ylim()
        low, high = ax.get_xlim()
        assert (low > high) == (measure == "loss")  # to the right is better
        assert min(low, high) <= scale * point["low"] <= scale * point["high"] <= max(low, high)
    assert figures.forest_data(study(seeds=1)) == []


def test_forest_puts_a_comparison_with_an_interval_for_the_loss_only_in_its_row():
    runs = study(seeds=2)
    for run_ in runs:
        run_["final"]["accuracy"] = 0.5 + 0.1 * (run_["variant"]["router"] is None)  # no spread: no interval
    data = figures.forest_data(runs)
    assert {point["measure"] for point in data if point["claim"] == "i"} == {"loss"}
    labels = [point["what"] for point in data if point["claim"] == "i"]
    panels = [ax for ax in plots.paint_forest(data).axes if ax.get_title(loc="left").startswith("(i) ")]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == labels
    assert [len(ax.lines) for ax in panels] == [1, 1 + 2 * len(labels)]  # the line at 0, intervals and marks


def test_ablations_draw_every_value():
    base = [run(variant("soft"), seed) for seed in range(5)]
    changed = variant("soft") | {"name": "x", "ablation": "soft_scale", "arm": "1"}
    runs = base + [run(changed, seed) for seed in range(3)]
    assert [row["seeds"] for row in figures.figure_1_data(runs)] == [5]  # figure 1 leaves the ablation out
    data = figures.ablation_data(runs)
    # The value 4 was not run. The runs for the value 16 are the comparison's runs of the same seeds.
    assert {point["ablation"] for point in data} == {"soft_scale"}
    assert [(point["arm"], point["seeds"], point["is_base"]) for point in data] == [
        ("1", 3, False), ("16", 3, True),
    ]  # fmt: skip
    first, second = data
    accuracies = [[r["final"]["accuracy"] for r in of] for of in (runs[5:], base[:3])]
    assert first["difference"] == pytest.approx(sum(accuracies[0]) / 3 - sum(accuracies[1]) / 3)
    assert second["difference"] is None
    (panel,) = plots.paint_ablations(data).axes
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["1", "4", "16"]
    assert figures.ablation_data(base) == []


def test_images_per_group_are_compared_at_equal_slots():
    made = [run(variant("softmax_expert_choice"), 0)]
    for arm in ("1", "8", "32"):
        base = variant("softmax_expert_choice")
        made.append(run(base | {"name": f"{base['name']}-group_size-{arm}", "ablation": "group_size", "arm": arm}, 0))
    accuracies = [record["final"]["accuracy"] for record in made]
    data = figures.ablation_data(made)
    assert [point["arm"] for point in data] == ["1", "8", "32"] and not any(point["is_base"] for point in data)
    assert [point["difference"] for point in data] == [
        pytest.approx(accuracies[1] - accuracies[2]),
        None,
        pytest.approx(accuracies[3] - accuracies[2]),
    ]
    assert [point["difference"] for point in figures.ablation_data(made[:2])] == [None]  # the reference has no runs yet
