"""docs/study_results.md has the results of the kept records."""

import importlib.util
from pathlib import Path

import pytest
from records import run, variant

from vmoe_routers.study.claims import decide
from vmoe_routers.study.figures import draw
from vmoe_routers.study.folders import read_runs
from vmoe_routers.study.orders import conditions

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("study_page", ROOT / "scripts" / "study_page.py")
assert spec and spec.loader
study_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study_page)

kept = pytest.mark.skipif(not study_page.RESULTS.is_dir(), reason="a source distribution has no kept results")


@kept
def test_the_page_is_made_from_the_kept_records():
    assert study_page.PAGE.read_text() == study_page.page(study_page.RESULTS)


@kept
def test_the_kept_pictures_are_made_from_the_kept_records():
    drawn = {drawing.name for drawing in draw(read_runs(study_page.RESULTS))}
    assert drawn == {path.stem for path in study_page.RESULTS.glob("*.png")}


def test_the_page_of_a_small_study():
    text = study_page.page(ROOT / "tests" / "fixtures" / "study")
    assert "| seeds per model | 1 |" in text and "| Soft MoE |" in text and "may change" not in text


LOSS = {  # by the weights of the auxiliary losses
    "softmax_expert_choice": {"0": 0.60, "0.005": 0.57, "0.05": 0.54},
    "softmax_token_choice": {"0": 0.61, "0.005": 0.58, "0.05": 0.56},
}
DEFAULT = {"softmax_expert_choice": "0", "softmax_token_choice": "0.005"}
ABLATION = {"softmax_expert_choice": "aux_loss", "softmax_token_choice": "aux_loss_token_choice"}


def small_study():
    made = []
    for seed in range(3):
        for router, losses in LOSS.items():
            base = variant(router, 1 if router == "softmax_token_choice" else None)
            for weight, loss in losses.items():
                changed = {"name": f"{base['name']}-{weight}", "ablation": ABLATION[router], "arm": weight}
                record = run(base | ({} if weight == DEFAULT[router] else changed), seed)
                # The seed changes both routers alike, up to a little that a t-test needs.
                own = 1e-4 * seed * (router == "softmax_token_choice")
                record["final"] |= {"loss": loss + 0.01 * seed + own, "accuracy": 0.75 + 0.002 * seed - own}
                made.append(record)
    return made


def test_in_short_says_what_is_decided_and_what_equal_weights_change():
    runs = small_study()
    claims, by_loss = decide(runs), decide(runs, "loss")
    equal = study_page._at_equal_weights(conditions(runs), conditions(runs, "loss"))
    assert [(of.weight, of.is_equal, of.loss.count) for of in equal] == [
        ("0", True, 3),
        ("0.005", True, 3),
        ("0.05", True, 3),
        ("0.005 in Token Choice, 0 in Expert Choice", False, 3),
    ]
    assert [of.loss.mean for of in equal] == pytest.approx([-0.0101, -0.0101, -0.0201, 0.0199])
    text = study_page._short(claims, by_loss, equal)
    told = (
        '- Claim (ii, softmax) is **contradicted** by the loss: "Softmax Expert Choice has a lower loss than Softmax '
    )
    assert f'{told}Token Choice with as many slots." The mean difference is +0.0199 nats.' in text
    assert "by the accuracy: " not in text and "(weight 0.05)" in text
    table = study_page._equal_losses(equal)[1]
    assert "| 0.005 in Token Choice, 0 in Expert Choice | 3 |" in table and "**-0.0201 ± 0.0001**" in table
    assert study_page._equal_losses([]) == [] and "weight" not in study_page._short(claims, by_loss, [])
