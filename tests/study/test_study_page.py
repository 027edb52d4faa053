"""docs/study_results.md has the results of the kept records."""

import importlib.util
from pathlib import Path

import pytest
from records import at_weights, run, variant

from vmoe_routers.study.claims import decide
from vmoe_routers.study.comparisons import Comparison
from vmoe_routers.study.equal_aux_losses import equal_aux_losses, verdict_of
from vmoe_routers.study.figures import draw
from vmoe_routers.study.folders import read_runs
from vmoe_routers.study.summary import summarise

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


def test_in_short_says_what_is_decided_and_what_equal_weights_change():
    runs = at_weights()
    claims, by_loss = decide(runs), decide(runs, "loss")
    equal, rows = equal_aux_losses(runs), summarise(runs)
    text = study_page._short(rows, claims, by_loss, equal, None)
    told = (
        '- Claim (ii, softmax) is **contradicted** by the loss: "Softmax Expert Choice has a lower loss than Softmax '
    )
    assert f'{told}Token Choice with as many slots." The mean difference is +0.0200 nats.' in text
    assert "by the accuracy: " not in text and "**-0.0201 ± 0.0001** (weight 0.05)" in text
    assert "takes is 30.0 % (weight 0), 29.5 % (weight 0.005), 25.0 % (weight 0.05) in Softmax Expert Choice" in text
    table = study_page._equal_losses(equal, runs, None, [])[1]
    assert "| 0.05 | 4 | -0.05 ± 0.10 | **-0.0201 ± 0.0001** | 25.0 | 45.0 |" in table
    assert "| defaults | 4 | -0.05 ± 0.10 | **+0.0200 ± 0.0001** | 30.0 | 49.5 |" in table
    assert "other seeds" not in text + table
    assert study_page._equal_losses(None, [], None, []) == []
    assert "weight" not in study_page._short(rows, claims, by_loss, None, None)
    told = [
        study_page._short(rows, claims, by_loss, equal, equal),
        study_page._equal_losses(equal, runs, equal, runs)[1],
    ]
    assert all(verdict_of(equal) in part and "other seeds" in part for part in told)


def test_the_page_has_the_replication_when_all_its_runs_are_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(study_page, "REPLICATION", tmp_path)
    names, runs = ["a", "b"], at_weights()
    monkeypatch.setattr(study_page, "read_contents", lambda folder: {"runs": names})
    monkeypatch.setattr(study_page, "read_runs", lambda folder, contents: runs)
    assert study_page._replication() == []
    names[:] = map(str, range(len(runs)))
    assert study_page._replication() == runs
    monkeypatch.setattr(study_page, "REPLICATION", tmp_path / "missing")
    assert study_page._replication() == []


def test_the_page_compares_routers_with_the_dense_vit_by_epochs():
    made = []
    for router in (None, "soft"):
        base = variant(router)
        for seed in range(3):
            for epochs, accuracy in (("1", 0.7), ("8", 0.8)):
                changed = {"name": f"{base['name']}-{epochs}", "ablation": "epochs", "arm": epochs}
                record = run(base | (changed if epochs == "8" else {}), seed)
                record["settings"]["epochs"] = int(epochs)
                ahead = 0.0 if router is None else 0.01 * int(epochs) + 0.001 * seed
                record["final"] |= {"accuracy": accuracy + ahead, "loss": 1 - accuracy - ahead}
                made.append(record)
    title, table = study_page._minus_dense(made)
    rows = [line for line in table.splitlines() if line.startswith(("| 1", "| 8"))]
    assert rows == [
        "| 1 | Soft MoE | 3 | **+1.10 ± 0.06** | **-0.0110 ± 0.0006** |",
        "| 8 | Soft MoE | 3 | **+8.10 ± 0.06** | **-0.0810 ± 0.0006** |",
    ]
    assert "by epochs" in title
    assert study_page._minus_dense([record for record in made if record["variant"]["router"]]) == []


def test_a_decided_claim_names_the_differences_with_the_other_sign():
    mean = Comparison("v", "accuracy", "mean of 3", None, mean=0.01, low=0.005, high=0.015, is_mean=True)
    singles = [
        Comparison("v", "accuracy", "a - b", None, mean=-0.02, low=-0.03, high=-0.01),
        Comparison("v", "accuracy", "c - d", None, mean=-0.02, low=-0.05, high=0.01),
        Comparison("v", "accuracy", "e - f", None, mean=0.02, low=0.01, high=0.03),
        Comparison("iv", "accuracy", "g - h", None, mean=-0.02, low=-0.03, high=-0.01),
    ]
    said = study_page._against(mean, [mean, *singles])
    assert said == " With the other sign, without a correction: a - b is -2.00 (-3.00 to -1.00)."
    assert study_page._against(mean, [mean, *singles[1:]]) == ""
