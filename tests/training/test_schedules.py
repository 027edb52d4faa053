"""Learning rates by step, against the reference's."""

import numpy as np
import pytest

from tests.parity import GOLDEN
from vmoe_routers.options import OptionError
from vmoe_routers.training.optimisation import Optimisation
from vmoe_routers.training.schedules import learning_rate

REFERENCE = {
    "linear": {"peak": 8e-4, "final": 1e-5, "warmup": 100},
    "cosine": {"peak": 3e-3, "final": 1e-5, "warmup": 50},
    "rsqrt": {"peak": 1e-3, "warmup": 100, "timescale": 100, "cooldown": 200},
}


@pytest.mark.parametrize("schedule", REFERENCE)
def test_schedules_equal_the_reference(schedule):
    golden = np.load(GOLDEN / "schedules.npz")
    ours = [learning_rate(int(step), 1000, schedule=schedule, **REFERENCE[schedule]) for step in golden["step"]]
    assert ours == pytest.approx(golden[schedule], abs=1e-9)


def test_constant_with_cooldown():
    rates = [learning_rate(s, 10, schedule="constant", peak=2.0, warmup=2, cooldown=4) for s in range(11)]
    assert rates == [0, 1, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_warm_up_as_share_of_few_steps(schedule, steps):
    rates = [Optimisation(schedule=schedule, warmup=0.5).learning_rate_at(step, steps) for step in range(steps + 1)]
    assert all(0 <= rate <= 1e-3 for rate in rates)
    assert Optimisation(warmup=3.0).learning_rate_at(1, steps) == pytest.approx(1e-3 / 3)


def test_a_warm_up_longer_than_the_training_is_refused():
    for schedule, warmup, cooldown in (
        ("cosine", 10, 99),
        ("rsqrt", 6, 4),
        ("constant", 0.7, 0.3),
        ("linear", 0.99, 0),
    ):
        Optimisation(schedule=schedule, warmup=warmup, cooldown=cooldown).check_steps(10)
    with pytest.raises(OptionError, match=r"warmup must take at most all 10 steps of the training, got warmup 1e\+09"):
        Optimisation(warmup=1e9).check_steps(10)
    for warmup, cooldown in ((6, 5), (0, 11), (0.6, 0.5)):
        with pytest.raises(OptionError, match="warmup and cooldown must take at most all 10 steps of the training"):
            Optimisation(schedule="rsqrt", warmup=warmup, cooldown=cooldown).check_steps(10)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("schedule", "exponential"),
        ("loss", "hinge"),
        ("trained", "attention"),
        ("precision", "int8"),
        ("optimizer", "adamz"),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("clip", float("inf")),
        ("ema", 1.0),
        ("label_smoothing", -0.1),
        ("layer_decay", 0.0),
        ("accumulate", 0),
        ("max_skipped", 0),
        ("warmup", "long"),
        ("clip", None),
        ("accumulate", 1.5),
        ("accumulate", True),
        ("optimizer_args", [1]),
        ("optimizer_args", {1: 2}),
        ("weight_decay", 1e3),
        ("head_weight_decay", 1e3),
        ("optimizer_args", {"lr": 1}),
        ("optimizer_args", {"params": []}),
    ],
)
def test_refused_values_name_the_option(option, value):
    with pytest.raises(OptionError, match=rf"\b{option}\b") as caught:
        Optimisation(**{option: value})
    assert option in caught.value.options
