"""Report of the finished runs of a folder."""

import csv
import io
import json
from dataclasses import replace

import pytest
from rich.console import Console
from test_compare import DENSE, SMALL, SOFT, study_of
from test_runs import made_up

from vmoe_routers.study import decide, read_runs, report_study, summarise
from vmoe_routers.study.records import RecordError, fingerprint, timing_path, write_record
from vmoe_routers.study.runs import run
from vmoe_routers.study.timing import time_steps

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def records():
    return {(v, seed): run(SMALL, v, seed, made_up(), None) for v in (DENSE, SOFT) for seed in range(2)}


def test_report_of_a_folder(tmp_path, records):
    folder = study_of(tmp_path / "a", records, [DENSE, SOFT])
    (removed,) = (folder / "runs").glob("soft*-seed1-*")
    removed.unlink()
    console = Console(file=io.StringIO(), width=80)
    path = report_study(folder, console)
    assert path == folder / "report.html"
    page = path.read_text()
    assert "3 of 4 runs are finished." in page and "no step was timed" in page and "made up" in page
    assert "Soft MoE" in console.file.getvalue() and "report: " in console.file.getvalue()
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert [(row["name"], row["seeds"], row["step_ms"]) for row in rows] == [("dense", "2", ""), ("soft-c1", "1", "")]
    assert all((folder / f"figure_1.{kind}").exists() for kind in ("png", "svg", "csv"))

    removed.write_text(json.dumps(records[SOFT, 1]))
    inputs = fingerprint(made_up(), None)
    timed = time_steps(SMALL, [DENSE, SOFT], made_up())
    write_record(timing_path(replace(SMALL, output=folder), inputs, [DENSE, SOFT]), timed)
    page = report_study(str(folder), console).read_text()
    assert "runs are finished." not in page and "no step was timed" not in page
    runs = read_runs(str(folder))
    assert [row.seeds for row in summarise(runs)] == [2, 2] and decide(runs)
    assert {run["variant"]["name"]: run["timing"]["step_ms"] for run in runs} == timed["step_ms"]


@pytest.mark.parametrize(("key", "value", "words"), [
    ("layers", [{"block": 0, "load": []}], r"utilisation is missing in layers\[0\]"),
    ("layers", 3, "layers is 3, wanted a list"),
    ("epochs", [{"epoch": 1}], r"seconds is missing in epochs\[0\]"),
    ("transfer", {"data": 3}, "transfer is a mapping of 1, wanted null, or the name of the data and a share"),
    ("steps", 0, "steps is 0, wanted a positive number"),
])  # fmt: skip
def test_damaged_records_are_named(tmp_path, records, key, value, words):
    def damaged(record):
        return record | {key: value}

    folder = study_of(tmp_path / "a", records, [DENSE], change=damaged)
    with pytest.raises(RecordError, match=words):
        report_study(folder)
