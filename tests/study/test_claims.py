"""Claims, from records with known answers."""

import csv
import math
import statistics

import pytest
from records import run, study, variant
from scipy.stats import nct, t, ttest_rel

from vmoe_routers.study.claims import CLAIMS, decide, remarks, verdicts, write_claims
from vmoe_routers.study.comparisons import POWER, power

SEEDS = range(5)
NOISE = (0.001, -0.002, 0.0005, 0.0015, -0.001)


def runs_of(made, accuracies, flops=4e6, step=10.0):
    """Makes runs with these final accuracies, one per seed."""
    found = []
    for seed, accuracy in enumerate(accuracies):
        record = run(made, seed)
        record["final"] = {"accuracy": accuracy, "loss": 1 - accuracy}
        record["cost"] = record["cost"] | {"flops": flops}
        record["timing"] = record["timing"] | {"step_ms": [step] * 3}
        found.append(record)
    return found


def around(mean, scale=1.0):
    return [mean + scale * noise for noise in NOISE]


def one(comparisons, claim, what):
    (found,) = [c for c in comparisons if c.claim == claim and c.what == what]
    return found


def test_a_clear_difference_is_decided_by_its_sign():
    token, expert = variant("softmax_token_choice", 1), variant("softmax_expert_choice")
    for mean, verdict in ((0.95, "supported"), (0.85, "contradicted")):
        first, second = around(mean), [0.9] * 5
        found = one(
            decide(runs_of(token, second) + runs_of(expert, first)), "ii, softmax", "Softmax EC - Softmax TC, K=1"
        )
        assert found.verdict == verdict and found.seeds == 5 and found.router == "softmax_expert_choice"
        wanted = ttest_rel(first, second)
        assert found.p == pytest.approx(wanted.pvalue) and found.p_holm == pytest.approx(wanted.pvalue)
        interval = wanted.confidence_interval()
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        (by_loss,) = decide(runs_of(token, second) + runs_of(expert, first), "loss")  # the loss is 1 - accuracy
        assert by_loss.measure == "loss" and by_loss.verdict == verdict
        assert (by_loss.mean, by_loss.low, by_loss.p) == pytest.approx((-found.mean, -found.high, found.p))


def test_holm_and_the_seeds_that_are_needed():
    # A small difference with p = 0.03 alone, together with nine comparisons of noise.
    made = []
    for capacity in (0.5, 1.0, 2.0):
        made += runs_of(variant("softmax_token_choice", 1, capacity=capacity), [0.9] * 5)
        made += runs_of(variant("softmax_expert_choice", capacity=capacity), around(0.9 + 0.002 * (capacity == 1)))
    comparisons = [c for c in decide(made) if c.claim == "ii, softmax" and not c.is_mean]
    tested = sorted(c.p for c in comparisons)
    assert next(c.p_holm for c in sorted(comparisons, key=lambda c: c.p)) == pytest.approx(3 * tested[0])
    clear = one(comparisons, "ii, softmax", "Softmax EC - Softmax TC, K=1")
    assert clear.p < 0.05 < clear.p_holm and clear.verdict == "not resolved"
    effect = clear.mean / statistics.stdev(around(0, 1))
    assert power(effect, clear.needed, 0.05 / 3) >= POWER > power(effect, clear.needed - 1, 0.05 / 3)
    none = one(comparisons, "ii, softmax", "Softmax EC, 2x - Softmax TC, K=1, 2x")
    assert none.needed is None or none.needed > 100


@pytest.mark.parametrize(("effect", "seeds", "level"), [(1.0, 10, 0.05), (0.2, 199, 0.05), (3.0, 4, 0.006)])
def test_power_is_the_tail_of_the_noncentral_t_distribution(effect, seeds, level):
    bound, shift = t.ppf(1 - level / 2, seeds - 1), effect * math.sqrt(seeds)
    wanted = nct.sf(bound, seeds - 1, shift) + nct.cdf(-bound, seeds - 1, shift)
    assert power(effect, seeds, level) == pytest.approx(wanted, abs=1e-4)
    assert power(0.0, seeds, level) == pytest.approx(level, rel=1e-2)
    assert power(100.0, seeds, level) == pytest.approx(1)  # where scipy's distribution may return NaN


def test_the_mean_of_its_comparisons_decides_a_claim():
    made, differences = [], []
    for seed, capacity in enumerate((0.5, 1.0, 2.0)):
        first, second = around(0.92, seed), around(0.9, 3 + seed)
        made += runs_of(variant("softmax_token_choice", 1, capacity=capacity), second)
        made += runs_of(variant("softmax_expert_choice", capacity=capacity), first)
        differences.append([a - b for a, b in zip(first, second, strict=True)])
    mean, *single = decide(made)
    assert mean.is_mean and mean.what == "mean of 3 comparisons" and mean.router is None
    assert not any(c.is_mean for c in single) and len(single) == 3
    of_seeds = [sum(values) / 3 for values in zip(*differences, strict=True)]
    wanted = ttest_rel(of_seeds, [0.0] * 5)
    assert mean.mean == pytest.approx(sum(of_seeds) / 5)
    # The only claim needs no correction for other claims; the comparisons are corrected for their own number.
    assert mean.p == mean.p_holm == pytest.approx(wanted.pvalue)
    smallest = min(single, key=lambda c: c.p)
    assert smallest.p_holm == pytest.approx(3 * smallest.p)
    assert verdicts([mean, *single])["ii, softmax"].startswith(f"{mean.verdict} on average; ")
    # Only seeds that all comparisons have count.
    fewer = [run for run in made if not (run["seed"] == 4 and run["variant"]["capacity_factor"] == 2)]
    assert decide(fewer)[0].seeds == 4 and {c.seeds for c in decide(fewer)[1:]} == {4, 5}


def test_equal_budgets_are_interpolated():
    dense = runs_of(variant(None), [0.9] * 5, flops=4e6, step=10.0)
    made = dense
    for capacity, flops, accuracy in ((0.5, 2e6, 0.88), (1.0, 8e6, 0.92)):
        made = made + runs_of(variant("soft", capacity=capacity), [accuracy] * 5, flops=flops, step=20.0)
    found = decide(made)
    # 4e6 lies halfway between 2e6 and 8e6 on the logarithmic scale, where the accuracy is 0.9.
    assert one(found, "i", "Soft MoE - Dense ViT").mean == pytest.approx(0.0, abs=1e-12)
    time = one(found, "i, time", "Soft MoE - Dense ViT")
    assert time.mean is None and time.reason == "step time 2.00 to 2.00 times the other model's"
    assert time.verdict == "not resolved" and verdicts(found)["i, time"] == "not comparable in 1 of 1"
    near = runs_of(variant("soft"), [0.95] * 5, flops=4.5e6)  # within 15 %
    assert one(decide(dense + near), "i", "Soft MoE - Dense ViT").mean == pytest.approx(0.05)
    far = runs_of(variant("soft"), [0.95] * 5, flops=5e6)
    assert one(decide(dense + far), "i", "Soft MoE - Dense ViT").reason == "FLOPs 1.25 times the other model's"


def test_slots_are_equal_for_claims_ii():
    made = runs_of(variant("softmax_token_choice", 2, capacity=0.5), around(0.9))
    made += runs_of(variant("softmax_expert_choice", capacity=1.0), around(0.9, 2))
    made += runs_of(variant("softmax_expert_choice", capacity=0.5), around(0.9, 3))
    assert [c.what for c in decide(made)] == ["Softmax EC - Softmax TC, K=2, 0.5x"]


def test_products_of_k_and_capacity_factor_are_rounded():
    assert 3 * 0.1 != 0.3
    made = runs_of(variant("softmax_token_choice", 3, capacity=0.1), around(0.9))
    made += runs_of(variant("softmax_expert_choice", capacity=0.3), around(0.9, 2))
    assert [c.claim for c in decide(made)] == ["ii, softmax"]


def test_a_study_without_timed_steps():
    runs = study(seeds=2, capacities=(0.5, 1.0))
    timed = decide(runs)
    for record in runs:
        del record["timing"]
    untimed = decide(runs)
    for before, after in zip(timed, untimed, strict=True):
        if before.claim.endswith("time"):
            assert after.mean is None and after.reason == "no step was timed"
        else:  # the number of all comparisons changes Holm's correction
            assert (after.what, after.mean, after.p) == (before.what, before.mean, before.p)


def test_every_claim_is_tested_on_a_whole_study():
    runs = study(seeds=5, transfer=True, capacities=(0.5, 1.0, 2.0))
    priority = []
    for record in runs:
        if record["variant"]["router"] == "softmax_token_choice":
            changed = record["variant"] | {"name": record["variant"]["name"] + "-priority", "batch_priority": True}
            priority.append(record | {"variant": changed})
    comparisons = decide(runs + priority)
    assert {c.claim for c in comparisons} == set(CLAIMS)
    counts = {claim: sum(c.claim == claim for c in comparisons) for claim in CLAIMS}
    assert counts == {
        "i": 7,
        "i, time": 7,
        "ii, softmax": 6,
        "ii, Sinkhorn": 6,
        "iii": 6,
        "iii, time": 6,
        "iv": 7,
        "v": 7,
        "vi": 1,
    }
    assert [c.claim for c in comparisons if c.is_mean] == [claim for claim in CLAIMS if claim != "vi"]
    assert all(c.what.count("priority") == 0 for c in comparisons if c.claim in ("i", "ii, softmax", "iii"))
    # Runs with the same accuracy with and without priority give no difference.
    assert all(c.mean == 0 and c.p == 1 and c.verdict == "not resolved" for c in comparisons if c.claim == "v")
    order = comparisons[-1]
    assert order.mean > 0.8 and order.verdict == "supported"  # the made-up transfer follows the accuracy
    assert decide(runs[::-1] + priority) == comparisons
    by_loss = decide(runs + priority, "loss")  # claim vi is about accuracy alone
    assert [(c.claim, c.what) for c in by_loss] == [(c.claim, c.what) for c in comparisons if c.claim != "vi"]


def test_too_little_to_decide():
    assert decide([]) == [] and set(verdicts([]).values()) == {"not tested"}
    pair = runs_of(variant("softmax_token_choice", 1), [0.9]) + runs_of(variant("softmax_expert_choice"), [0.95])
    (found,) = decide(pair)
    assert found.mean == pytest.approx(0.05) and (found.low, found.p, found.p_holm, found.needed) == (None,) * 4
    assert found.verdict == "not resolved"
    pair[0]["final"]["accuracy"] = math.nan
    assert decide(pair)[0].mean is None


def test_remarks_judge_both_measures_together():
    token, expert = variant("softmax_token_choice", 1), variant("softmax_expert_choice")
    made = runs_of(token, [0.9] * 5) + runs_of(expert, around(0.902))
    by_accuracy, by_loss = decide(made), decide(made, "loss")
    assert 0.025 < by_accuracy[0].p < 0.05 and by_accuracy[0].verdict == by_loss[0].verdict == "supported"
    (found,) = remarks(made, by_accuracy, by_loss)  # without transfer
    assert found.endswith("by both measures, no claim is decided.")
    clear = runs_of(token, [0.9] * 5) + runs_of(expert, around(0.92))
    (found,) = remarks(clear, decide(clear), decide(clear, "loss"))
    assert found.endswith("are: (ii, softmax) supported by the accuracy; (ii, softmax) supported by the loss.")
    assert remarks(made[:1] + made[5:6], decide(made[:1] + made[5:6]), []) == []  # one seed


def test_remarks_have_the_rank_correlation_of_means():
    made = []
    for place, router in enumerate(("softmax_expert_choice", "sinkhorn_expert_choice", "soft")):
        accuracies = [0.8 + 0.01 * place + noise for noise in ((0, 0), (0.02, -0.02), (0, 0))[place]]
        for record in runs_of(variant(router), accuracies):
            made.append(record | {"transfer": {"data": "digits", "accuracy": 0.5 + 0.1 * place}})
    (order,) = [c for c in decide(made) if c.claim == "vi"]
    assert order.mean == pytest.approx(0.5)
    assert remarks(made, decide(made), [])[-1].endswith(
        "is +1.00, without a test. These means have less noise than single runs."
    )
    assert all("vi" not in found for found in remarks(made[::2], [], []))  # one seed


def test_csv(tmp_path):
    comparisons = decide(study(seeds=2))
    write_claims(comparisons, tmp_path / "claims.csv")
    with open(tmp_path / "claims.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(comparisons)
    assert float(rows[0]["mean"]) == comparisons[0].mean and rows[0]["claim"] == "i"


def test_differences_without_spread_are_not_tested():
    """A t-test of equal differences would divide by 0, or by a rounding error."""
    token, expert = variant("softmax_token_choice", 1), variant("softmax_expert_choice")
    for first, second in (([0.91] * 3, [0.9] * 3), ([0.3, 0.2, 0.1], [0.2, 0.1, 0.0])):
        (found,) = decide(runs_of(token, second) + runs_of(expert, first))
        assert found.mean == pytest.approx(first[0] - second[0]) and found.seeds == 3
        assert (found.low, found.high, found.p, found.p_holm, found.needed) == (None,) * 5
        assert found.verdict == "not resolved"
    (found,) = decide(runs_of(token, [0.1 + 0.2] * 3) + runs_of(expert, [0.3] * 3))  # 0 up to rounding
    assert (found.mean, found.low, found.p, found.needed) == (0, 0, 1, None) and found.verdict == "not resolved"


def test_an_own_router_is_compared_with_the_dense_model():
    own = variant("soft") | {"name": "mine", "label": "mine", "router": "package:mine", "capacity_factor": None}
    found = decide(runs_of(variant(None), [0.9] * 5) + runs_of(own, around(0.95)))
    assert [(c.claim, c.what, c.router) for c in found] == [
        (claim, "mine - Dense ViT", "package:mine") for claim in ("i", "i, time")
    ]
    assert {c.verdict for c in found} == {"supported"}


def test_reasons_without_values():
    token, expert = variant("softmax_token_choice", 1), variant("softmax_expert_choice")
    late = [record | {"seed": record["seed"] + 5} for record in runs_of(expert, [0.9])]
    assert [c.reason for c in decide(runs_of(token, [0.9]) + late)] == ["no seed in common"]
    assert [c.reason for c in decide(runs_of(token, [0.9]) + runs_of(expert, [math.nan]))] == ["a value is not finite"]
