"""The study that an earlier version wrote (tests/fixtures/study) is read, and continues without repeating a run."""

from dataclasses import replace
from pathlib import Path

import pytest

from vmoe_routers.study import Settings, variants
from vmoe_routers.study.folders import read_contents, read_runs
from vmoe_routers.study.images import load_images
from vmoe_routers.study.jobs import Timing
from vmoe_routers.study.records import fingerprint, read_run, run_path, timing_path

FOLDER = Path(__file__).parents[1] / "fixtures" / "study"


@pytest.fixture(scope="module")
def settings():
    """Reads the settings in study.json. A field that is newer than the file has its default."""
    kept = read_contents(FOLDER)["settings"]
    return Settings(**{**kept, "output": FOLDER})


@pytest.fixture(scope="module")
def inputs(settings):
    return fingerprint(*load_images(settings))


def test_every_record_is_found_where_the_settings_say(settings, inputs):
    found = variants(settings)
    paths = [run_path(settings, inputs, variant, 0) for variant in found]
    assert [path.name for path in paths] == read_contents(FOLDER)["runs"]
    for path, variant in zip(paths, found, strict=True):
        record = read_run(path, settings, variant, 0, None)
        assert record is not None and record["variant"]["name"] == variant.name
    timing = Timing(found, timing_path(settings, inputs, found)).read()
    assert timing is not None and timing["step_ms"].keys() == {variant.name for variant in found}


def test_other_settings_do_not_find_them(settings, inputs):
    other = replace(settings, learning_rate=settings.learning_rate / 2)
    assert not any(run_path(other, inputs, variant, 0).exists() for variant in variants(settings))


def test_a_comparison_reads_the_records():
    runs = read_runs(FOLDER, read_contents(FOLDER))
    assert [run["variant"]["router"] for run in runs] == [None, "softmax_expert_choice", "soft"]
    assert all(len(run["layers"]) == (run["variant"]["router"] is not None) for run in runs)
