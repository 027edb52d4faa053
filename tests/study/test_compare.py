"""Two studies side by side."""

import io
import json
import os
from dataclasses import replace

import pytest
from rich.console import Console
from test_runs import TINY, made_up

from vmoe_routers.study import Variant, compare_studies
from vmoe_routers.study.compare import StudiesDiffer
from vmoe_routers.study.folders import write_contents
from vmoe_routers.study.jobs import Job, Timing
from vmoe_routers.study.records import RecordError, fingerprint, run_path, timing_path, write_record
from vmoe_routers.study.runs import run

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = replace(TINY, epochs=1)
DENSE, SOFT, EXPERT_CHOICE = Variant(), Variant("soft", 1.0), Variant("softmax_expert_choice", 1.0)


@pytest.fixture(scope="module")
def records():
    return {(v, seed): run(SMALL, v, seed, made_up(), None) for v in (DENSE, SOFT, EXPERT_CHOICE) for seed in range(2)}


def study_of(folder, records, found, settings=SMALL, data=None, change=lambda record: record):
    settings, data = replace(settings, output=folder), data or made_up()
    inputs = fingerprint(data, None)
    jobs = [Job(v, seed, run_path(settings, inputs, v, seed)) for v in found for seed in range(2)]
    folder.mkdir()
    write_contents(settings, data, jobs, Timing(found, timing_path(settings, inputs, found)))
    for job in jobs:
        write_record(job.path, change(json.loads(json.dumps(records[job.variant, job.seed]))))
    return folder


def compared(a, b):
    console = Console(file=io.StringIO(), width=100)
    compare_studies(a, b, console)
    return console.file.getvalue()


def test_a_new_router_beside_kept_records(tmp_path, records):
    def better(record):
        record["final"]["accuracy"] = 0.5 + 0.01 * record["seed"]
        return record

    a = study_of(tmp_path / "a", records, [DENSE, SOFT])
    b = study_of(tmp_path / "b", records, [DENSE, EXPERT_CHOICE, SOFT], change=better)
    said = compared(a, b)
    assert [line.split("  ")[0] for line in said.splitlines()[2:5]] == ["Dense ViT", "Soft MoE", "Softmax EC"]
    first = [records[SOFT, seed]["final"]["accuracy"] for seed in range(2)]
    assert f"{50 * sum(first):.2f}±" in said and "50.50±0.50" in said
    line = next(line for line in said.splitlines() if line.startswith("Softmax EC"))
    assert line.split()[2:] == ["-", "50.50±0.50", "-", "-", "+0.00±0.00"]
    assert compared(a, a).count("+0.00±0.00") >= 1


def test_studies_without_a_common_seed_say_so(tmp_path, records):
    a = study_of(tmp_path / "a", records, [DENSE, SOFT])
    b = study_of(tmp_path / "b", records, [DENSE, SOFT], change=lambda record: record | {"seed": record["seed"] + 5})
    assert "seeds: 0, 1 and 5, 6; B - A needs common seeds\n" in compared(a, b)
    assert "common seeds" not in compared(a, a)


@pytest.mark.parametrize(("changes", "words"), [
    ({"epochs": 2}, "settings differ: epochs 1 and 2"),
    ({"width": 32, "shift": 0}, "settings differ: shift 1 and 0; width 16 and 32"),
])  # fmt: skip
def test_other_trainings_are_refused_by_name(tmp_path, records, changes, words):
    def changed(record):
        record["settings"] |= changes
        return record

    a = study_of(tmp_path / "a", records, [DENSE])
    b = study_of(tmp_path / "b", records, [DENSE], change=changed)
    with pytest.raises(StudiesDiffer, match=words):
        compared(a, b)


def test_other_images_are_refused(tmp_path, records):
    a = study_of(tmp_path / "a", records, [DENSE])
    b = study_of(tmp_path / "b", records, [DENSE], data=made_up(seed=1))
    with pytest.raises(StudiesDiffer, match="different images, both named 'made up'"):
        compared(a, b)
    c = study_of(tmp_path / "c", records, [DENSE], data=replace(made_up(seed=1), name="others"))
    with pytest.raises(StudiesDiffer, match="different images: 'made up' and 'others'"):
        compared(a, c)


def test_other_machines_and_versions_are_told(tmp_path, records):
    def changed(record):
        record["machine"] |= {"torch": "9.9.9"}
        record["settings"]["learning_rate"] = 0.5
        return record

    a = study_of(tmp_path / "a", records, [DENSE])
    b = study_of(tmp_path / "b", records, [DENSE], change=changed)
    said = compared(a, b)
    assert "torch: " in said and "and 9.9.9" in said and "learning rate of dense: 0.002 and 0.5" in said


def test_what_is_no_study(tmp_path, records):
    a = study_of(tmp_path / "a", records, [DENSE])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(RecordError, match=r"holds no study, study\.json is missing"):
        compared(a, empty)
    for text, words in (
        ("{", "no description of a study"), ("[]", "records of version None"), ('{"version": 4}', "version 4, wanted"),
        ('{"version": 5, "runs": 3}', "runs must be a list of file names"),
        ('{"version": 5, "runs": []}', "settings must be a dict"),
    ):  # fmt: skip
        (empty / "study.json").write_text(text)
        with pytest.raises(RecordError, match=words):
            compared(a, empty)
    (empty / "study.json").unlink()
    os.mkfifo(empty / "study.json")
    with pytest.raises(RecordError, match="not a regular file"):
        compared(a, empty)
    next((a / "runs").iterdir()).write_text("{}")
    with pytest.raises(RecordError, match="no record"):
        compared(a, a)
    for record in (a / "runs").iterdir():
        record.unlink()
    with pytest.raises(RecordError, match="holds no finished run"):
        compared(a, a)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("combine", [], r"variant\.combine is \[\], wanted null or a text"),
    ("top_k", "x", r"variant\.top_k is 'x', wanted null or a number"),
    ("capacity_factor", [1.0], r"variant\.capacity_factor is a list of 1, wanted null or a number"),
    ("batch_priority", 3, r"variant\.batch_priority is 3, wanted null, true or false"),
    ("router", 3, r"variant\.router is 3, wanted null or a text"),
    ("name", "dense", "a second record of dense with seed 0"),
])  # fmt: skip
def test_odd_variants_are_refused(tmp_path, records, key, value, words):
    def odd(record):
        record["variant"][key] = value
        return record

    a = study_of(tmp_path / "a", records, [DENSE])
    b = study_of(tmp_path / "b", records, [DENSE, SOFT], change=odd)
    with pytest.raises(RecordError, match=words):
        compared(a, b)


def test_a_record_is_read_once_and_own_routers_are_told_apart(tmp_path, records):
    def own(record):
        record["variant"]["router"] = record["variant"]["router"] and "package:soft"
        return record

    a = study_of(tmp_path / "a", records, [DENSE, SOFT])
    b = study_of(tmp_path / "b", records, [DENSE, SOFT], change=own)
    contents = json.loads((a / "study.json").read_text())
    contents["runs"] += contents["runs"]
    (a / "study.json").write_text(json.dumps(contents))
    assert "router of soft-c1: soft and package:soft" in compared(a, b)
