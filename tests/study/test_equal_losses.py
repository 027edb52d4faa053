"""Softmax Expert Choice against Softmax Token Choice with equal auxiliary losses."""

import pytest
from records import NOISE, at_weights
from scipy.stats import ttest_1samp

from vmoe_routers.study import report
from vmoe_routers.study.equal_losses import equal_losses, verdict_of


def test_the_mean_over_the_weights_is_tested_seed_by_seed():
    by_accuracy, by_loss = equal_losses(at_weights())
    expected = [-(0.01 + 0.01 + 0.02) / 3 - noise for noise in NOISE]
    test = ttest_1samp(expected, 0.0)
    low, high = test.confidence_interval()
    found = by_loss.test
    assert (found.mean, found.low, found.high) == pytest.approx((sum(expected) / 4, low, high))
    assert found.p == pytest.approx(test.pvalue) and found.p_holm == pytest.approx(2 * test.pvalue)
    assert (found.verdict, found.seeds, by_loss.seeds) == ("supported", 4, [0, 1, 2, 3])
    weights = {weight: value.mean + sum(NOISE) / 4 for weight, value in by_loss.weights.items()}
    assert weights == pytest.approx({"0": -0.01, "0.005": -0.01, "0.05": -0.02})
    assert by_accuracy.test.verdict == "not resolved"
    said = verdict_of([by_accuracy, by_loss])
    assert "is not resolved by the accuracy (mean difference -0.05 points, " in said
    assert "and supported by the loss (mean difference -0.0134 nats, " in said
    assert "the weights 0, 0.005, 0.05 and the seeds 0, 1, 2, 3." in said


def test_only_seeds_with_all_weights_count():
    made = [record for record in at_weights() if (record["seed"], record["variant"]["arm"]) != (1, "0.05")]
    assert [of.seeds for of in equal_losses(made)] == [[0, 2, 3]] * 2
    assert equal_losses([record for record in made if record["variant"]["arm"] != "0.005"]) == []
    assert equal_losses([]) == []


def test_one_seed_and_a_diverged_run_have_no_test():
    made = at_weights(seeds=1)
    said = verdict_of(equal_losses(made))
    assert "by the loss (mean difference -0.0134 nats)." in said and "seed 0." in said and "p-value" not in said
    made[0]["final"]["loss"] = float("nan")
    assert "not comparable by the loss (a value is not finite)" in verdict_of(equal_losses(made))


def test_the_report_has_the_test(tmp_path):
    text = report.write_report(tmp_path, at_weights(), {"command": ""}).read_text(encoding="utf-8")
    assert "with equal auxiliary losses</h2>" in text and "supported by the loss (mean" in text
