"""docs/study_results.md has the results of the kept records."""

import importlib.util
from pathlib import Path

import pytest
from records import at_weights

from vmoe_routers.study.claims import decide
from vmoe_routers.study.equal_aux_losses import equal_aux_losses, verdict_of
from vmoe_routers.study.figures import draw
from vmoe_routers.study.folders import read_runs

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
    equal = equal_aux_losses(runs)
    text = study_page._short(claims, by_loss, equal, None)
    told = (
        '- Claim (ii, softmax) is **contradicted** by the loss: "Softmax Expert Choice has a lower loss than Softmax '
    )
    assert f'{told}Token Choice with as many slots." The mean difference is +0.0200 nats.' in text
    assert "by the accuracy: " not in text and "**-0.0201 ± 0.0001** (weight 0.05)" in text
    assert "takes is 30.0 % (weight 0), 29.5 % (weight 0.005), 25.0 % (weight 0.05) in Softmax Expert Choice" in text
    table = study_page._equal_losses(equal, None)[1]
    assert "| 0.05 | 4 | -0.05 ± 0.10 | **-0.0201 ± 0.0001** | 25.0 | 45.0 |" in table
    assert "other seeds" not in text + table
    assert study_page._equal_losses(None, None) == []
    assert "weight" not in study_page._short(claims, by_loss, None, None)
    told = [study_page._short(claims, by_loss, equal, equal), study_page._equal_losses(equal, equal)[1]]
    assert all(verdict_of(equal) in part and "other seeds" in part for part in told)


def test_the_page_has_the_replication_when_all_its_runs_are_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(study_page, "REPLICATION", tmp_path)
    names = ["a", "b"]
    runs = at_weights()
    monkeypatch.setattr(study_page, "read_contents", lambda folder: {"runs": names})
    monkeypatch.setattr(study_page, "read_runs", lambda folder, contents: runs)
    assert study_page._replication() is None
    names[:] = map(str, range(len(runs)))
    assert study_page._replication().seeds == [0, 1, 2, 3]
    monkeypatch.setattr(study_page, "REPLICATION", tmp_path / "missing")
    assert study_page._replication() is None
