"""docs/study_results.md has the results of the kept records."""

import importlib.util
from pathlib import Path

import pytest

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
