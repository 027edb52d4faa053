"""Conditions under which the routers have the paper's order."""

import csv

import pytest
from records import run, variant

from vmoe_routers.study.orders import conditions, order_sentences, write_orders
from vmoe_routers.study.tables import order_table

EXPERT, TOKEN, SOFT = variant("softmax_expert_choice"), variant("softmax_token_choice", 1), variant("soft")
SOFTMAX = ("softmax_expert_choice", "softmax_token_choice")


def of_accuracy(which, value, seed=0, **changed):
    made = run(which, seed) | changed
    return made | {"final": {"accuracy": value, "loss": 1.0}}


def ablated(which, ablation, arm):
    return which | {"name": f"{which['name']}-{ablation}-{arm}", "ablation": ablation, "arm": arm}


def study(*more):
    """Makes three seeds, in which Expert Choice is about 2 points behind Token Choice."""
    runs = [of_accuracy(EXPERT, 0.78 + noise, seed) for seed, noise in enumerate((0.0, 0.001, -0.001))]
    return [*runs, *(of_accuracy(TOKEN, 0.80, seed) for seed in range(3)), *more]


def test_a_capacity_factor_is_a_condition():
    doubled = {**EXPERT, "name": "softmax_expert_choice-c2", "capacity_factor": 2.0}
    (found,) = conditions(study(of_accuracy(doubled, 0.9)))  # Token Choice has no runs at factor 2
    assert (found.title, found.value) == ("capacity factor", "1")
    assert found.differences[SOFTMAX].mean == pytest.approx(-0.02) and found.differences[SOFTMAX].count == 3


def test_an_ablation_of_one_router_is_compared_with_the_comparisons_runs_of_the_other():
    runs = study(*(of_accuracy(ablated(EXPERT, "aux_loss", "0.05"), 0.83 + 0.001 * seed, seed) for seed in range(3)))
    _, found = conditions(runs)
    assert (found.title, found.value) == ("auxiliary loss of Expert Choice", "0.05")
    assert found.differences[SOFTMAX].mean == pytest.approx(0.031)


def test_an_ablation_of_a_shared_setting_compares_its_own_runs_only():
    longer = [of_accuracy(ablated(EXPERT, "epochs", "8"), 0.9, seed) for seed in range(3)]
    assert [found.title for found in conditions(study(*longer))] == ["capacity factor"]
    longer += [of_accuracy(ablated(TOKEN, "epochs", "8"), 0.85, 1)]
    _, found = conditions(study(*longer))
    assert (found.title, found.value) == ("epochs", "8")
    assert found.differences[SOFTMAX].mean == pytest.approx(0.05) and found.differences[SOFTMAX].count == 1


def test_an_ablation_of_both_routers_compares_its_own_runs_only():
    one = [of_accuracy(ablated(EXPERT, "noise", "0"), 0.9)]
    assert [found.title for found in conditions(study(*one))] == ["capacity factor"]
    _, found = conditions(study(*one, of_accuracy(ablated(TOKEN, "noise", "0"), 0.85)))
    assert found.differences[SOFTMAX].mean == pytest.approx(0.05)


def test_the_scale_of_soft_moe_is_compared_with_the_comparisons_runs():
    runs = study(of_accuracy(SOFT, 0.7), of_accuracy(ablated(SOFT, "soft_scale", "4"), 0.75))
    _, found = conditions(runs)
    assert (found.title, found.value) == ("initial scale of Soft MoE", "4")
    assert found.differences["soft", "softmax_token_choice"].mean == pytest.approx(-0.05)


def test_an_ablation_leaves_out_pairs_that_it_does_not_touch():
    runs = study(of_accuracy(SOFT, 0.7), of_accuracy(ablated(EXPERT, "aux_loss", "0.05"), 0.81))
    base, found = conditions(runs)
    assert ("soft", "softmax_token_choice") in base.differences
    assert set(found.differences) == {SOFTMAX, ("soft", "softmax_expert_choice")}


def test_routers_are_also_compared_at_equal_auxiliary_losses():
    expert = [of_accuracy(ablated(EXPERT, "aux_loss", arm), value) for arm, value in (("0.005", 0.81), ("0.05", 0.83))]
    token = [of_accuracy(ablated(TOKEN, "aux_loss_token_choice", arm), 0.79) for arm in ("0", "0.05")]
    found = {(of.title, of.value): of.differences[SOFTMAX].mean for of in conditions(study(*expert, *token))}
    # At 0 and 0.005, one of the routers has its default, so the conditions of one router have equal values, too.
    assert [key for key in found if key[0].startswith("auxiliary")] == [
        ("auxiliary loss of Expert Choice", "0.005"),
        ("auxiliary loss of Expert Choice", "0.05"),
        ("auxiliary loss of Token Choice", "0"),
        ("auxiliary loss of Token Choice", "0.05"),
        ("auxiliary loss of both routers", "0.05"),
    ]
    assert found["auxiliary loss of both routers", "0.05"] == pytest.approx(0.04)


def test_sentences_count_and_name_the_conditions(tmp_path):
    runs = study(*(of_accuracy(ablated(EXPERT, "aux_loss", "0.05"), 0.83 + 0.001 * seed, seed) for seed in range(3)))
    found = conditions(runs)
    assert order_sentences(found) == [
        "Softmax Expert Choice is ahead of Softmax Token Choice in 1 of 2 conditions (clearly in 1: auxiliary loss "
        "of Expert Choice 0.05), and behind in 1 (clearly in 1: capacity factor 1)."
    ]
    assert "<td class=clear>-2.00 ±0.06</td>" in order_table(found)
    write_orders(found, tmp_path / "orders.csv")
    with open(tmp_path / "orders.csv", newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["value"] for line in lines] == ["1", "0.05"] and lines[0]["seeds"] == "3"


def test_a_lower_loss_is_ahead():
    runs = study()
    for record in runs:
        record["final"]["loss"] = record["final"]["accuracy"] + 0.2
    (found,) = conditions(runs, "loss")
    assert found.measure == "loss" and found.differences[SOFTMAX].mean == pytest.approx(-0.02)
    assert order_sentences([found]) == [
        "Softmax Expert Choice is ahead of Softmax Token Choice in 1 of 1 condition (clearly in 1: capacity factor "
        "1), and behind in 0."
    ]
    assert "<td class=clear>-0.0200 ±0.0006</td>" in order_table([found])


def test_a_study_without_both_routers_has_no_conditions():
    assert conditions([run(SOFT)]) == [] and order_sentences([]) == []
