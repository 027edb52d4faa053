"""Softmax Expert Choice against Softmax Token Choice with equal auxiliary losses."""

import pytest
from records import NOISE, at_weights, variant
from records import run as make_run
from scipy.stats import ttest_1samp

from vmoe_routers.study import report
from vmoe_routers.study.equal_aux_losses import equal_aux_losses, verdict_of
from vmoe_routers.study.recipes import RECIPES
from vmoe_routers.study.variants import planned_runs

DIFFERENCES = [-(0.01 + 0.01 + 0.02) / 3 - noise for noise in NOISE]  # of the loss, as means over the weights


def test_the_mean_over_the_weights_is_tested_seed_by_seed():
    found = equal_aux_losses(at_weights())
    by_accuracy, by_loss = found.tests
    expected = ttest_1samp(DIFFERENCES, 0.0)
    low, high = expected.confidence_interval()
    assert (by_loss.mean, by_loss.low, by_loss.high) == pytest.approx((sum(DIFFERENCES) / 4, low, high))
    assert by_loss.p == pytest.approx(expected.pvalue) and by_loss.p_holm == pytest.approx(2 * expected.pvalue)
    assert (by_loss.verdict, by_loss.seeds, found.seeds) == ("supported", 4, [0, 1, 2, 3])
    assert by_accuracy.verdict == "not resolved"
    by_weight = {weight: value.mean + sum(NOISE) / 4 for weight, value in found.differences["loss"].items()}
    assert by_weight == pytest.approx({"0": -0.01, "0.005": -0.01, "0.05": -0.02})
    assert found.dropped == {
        weight: pytest.approx((0.3 - float(weight), 0.5 - float(weight))) for weight in ("0", "0.005", "0.05")
    }


def test_the_verdict_says_what_was_tested():
    found = equal_aux_losses(at_weights())
    by_accuracy, by_loss = found.tests
    assert verdict_of(found) == (
        '"With equal weights of the auxiliary losses, Softmax Expert Choice is better than Softmax Token Choice" is '
        f"not resolved by the accuracy (mean difference -0.05 points, 95 % interval {100 * by_accuracy.low:+.2f} to "
        f"{100 * by_accuracy.high:+.2f}, p = {by_accuracy.p_holm:.2g}) and supported by the loss (mean difference "
        f"-0.0134 nats, 95 % interval {by_loss.low:+.4f} to {by_loss.high:+.4f}, p = {by_loss.p_holm:.2g}). The means "
        "are over the weights 0, 0.005, 0.05 and the seeds 0, 1, 2, 3. The p-values have Holm's correction for two "
        "tests. The intervals have no correction."
    )
    assert f"{by_loss.p_holm:.2g}" != f"{by_loss.p:.2g}"


def test_only_seeds_with_all_weights_count():
    made = [record for record in at_weights() if (record["seed"], record["variant"]["arm"]) != (1, "0.05")]
    found = equal_aux_losses(made)
    assert found.seeds == [0, 2, 3] and {of.count for of in found.differences["loss"].values()} == {3}
    for record in made:  # the shares are over the same seeds
        if record["seed"] == 1:
            record["layers"][0]["dropped"] = 1.0
    assert equal_aux_losses(made).dropped == found.dropped
    assert equal_aux_losses([record for record in made if record["variant"]["arm"] != "0.005"]) is None
    assert equal_aux_losses([]) is None


def test_one_seed_has_no_test_and_a_diverged_run_counts_as_one():
    said = verdict_of(equal_aux_losses(at_weights(seeds=1)))
    assert "by the loss (mean difference -0.0134 nats)." in said and "seed 0." in said and "p-value" not in said
    made = at_weights()
    made[0]["final"]["accuracy"] = float("nan")
    found = equal_aux_losses(made)
    assert "not comparable by the accuracy (a value is not finite)" in verdict_of(found)
    assert found.tests[1].p_holm == pytest.approx(2 * found.tests[1].p)


def test_the_report_has_the_test_when_all_runs_are_finished(tmp_path):
    made = at_weights()
    said = report.of_equal_aux_losses(made, len(made))
    assert said[0] == verdict_of(equal_aux_losses(made))
    (said,) = report.of_equal_aux_losses(made, len(made) + 1)
    assert said == "The test with equal auxiliary losses is made when all runs are finished."
    assert report.of_equal_aux_losses([make_run(variant("soft"))]) == []
    text = report.write_report(tmp_path, made, {"command": ""}).read_text(encoding="utf-8")
    assert "with equal auxiliary losses</h2>" in text and "supported by the loss (mean" in text


def test_the_recipe_has_seeds_that_did_not_suggest_the_test():
    runs = planned_runs(RECIPES["fashion_equal_aux_losses"]())
    seeds = {seed for _, seed in runs}
    assert seeds == {5, 6, 7, 8, 9, 10, 11, 12}
    assert not seeds & {seed for _, seed in planned_runs(RECIPES["fashion"]())}
    weights = {(variant.router, variant.ablation, variant.arm, seed) for variant, seed in runs if variant.router}
    assert len(runs) == 56 and len(weights) == 2 * 3 * 8
