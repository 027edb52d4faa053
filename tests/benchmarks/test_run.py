"""The timer, the ceilings' arithmetic, and a run from the command to the page."""

import json
import time

import pytest

from benchmarks import ceilings, run, tables, timer
from benchmarks.case import Entry, Floor, Size
from benchmarks.cases import topk

CEILINGS = ceilings.Ceilings(
    1e9,
    2e9,
    {"L2": 4e9, "L3": 2e9, "DRAM": 1e9},
    {"L2": 3e9, "L3": 3e9, "DRAM": 1e9},
    1e8,
    {"L2": 10, "L3": 100, "DRAM": 1000},
)


def test_ratio_of_twice_the_work_is_two():
    timings, again = timer.measure({"one": lambda: time.sleep(0.002), "two": lambda: time.sleep(0.004)})
    assert 1.6 < timings["two"].ratio.median < 2.4
    assert timings["one"].ratio.median == 1
    assert again.low <= again.median <= again.high


def test_a_short_call_is_repeated():
    assert timer.repeats_for(lambda: None, "cpu", 1e-3) > 100


def test_unstable_is_ten_per_cent_either_way():
    assert timer.is_unstable(timer.Ratio(1.11, 1, 2)) and timer.is_unstable(timer.Ratio(0.89, 0, 1))
    assert timer.is_unstable(timer.Ratio(1, 0.6, 1)) and timer.is_unstable(timer.Ratio(1, 1, 1.4))
    assert not timer.is_unstable(timer.Ratio(1.09, 0.9, 1.2))


def test_bootstrap_holds_the_median():
    ratio = timer.bootstrap([1.0, 2.0, 3.0, 4.0, 100.0])
    assert ratio.median == 3 and ratio.low <= 3 <= ratio.high


def test_floor_takes_the_bandwidth_of_the_level_that_holds_the_bytes():
    assert CEILINGS.seconds(Floor(bytes=20))["L2 bandwidth"] == pytest.approx(20 / 4e9)
    assert CEILINGS.seconds(Floor(bytes=200))["L3 bandwidth"] == pytest.approx(200 / 3e9)
    seconds = CEILINGS.seconds(Floor(flops=4, bytes=1e6, exps=1))
    assert seconds == {"gemm": 2e-9, "DRAM bandwidth": pytest.approx(1e-3), "exp": 1e-8}


def test_the_higher_ceiling_counts():
    other = ceilings.Ceilings(3e9, 1e9, dict.fromkeys(CEILINGS.read, 3e9), CEILINGS.copy, 1, CEILINGS.sizes)
    best = CEILINGS.at_least(other)
    assert (best.gemm, best.gemm_layer, best.exp) == (3e9, 2e9, 1e8)
    assert best.read == {"L2": 4e9, "L3": 3e9, "DRAM": 3e9}
    assert best.floor(Floor(flops=3e9))["seconds"] == 1 and best.floor(Floor(flops=3e9))["by"] == "gemm"


def test_options_are_refused(capsys):
    for wrong in (["--rounds", "3"], ["--threads", "two"], ["--only", "nothing"]):
        with pytest.raises(SystemExit):
            run.parse(wrong)
    assert "at least 15" in capsys.readouterr().err


def test_run_writes_results_figures_and_page(tmp_path, monkeypatch, capsys):
    entry = Entry("topk", topk.build, quick=Size(images=1, tokens=32, experts=4))
    monkeypatch.setattr(run, "entries", lambda op=None: [entry])
    monkeypatch.setattr(run, "measure_ceilings", lambda *args, **options: CEILINGS)
    results = tmp_path / "benchmarks" / "results"
    docs = tmp_path / "docs"
    docs.mkdir()
    run.main(["--quick", "--only", "topk", "--json", str(results / "here.json")])
    printed = capsys.readouterr().out
    assert "Targets" in printed and "floor / time" in printed and "A/A" in printed
    report = json.loads((results / "here.json").read_text())
    assert [r["direction"] for r in report["results"]] == ["forward", "forward + backward"]
    assert {"isa", "date", "versions"} <= report["machine"].keys()
    assert sorted(p.name for p in results.glob("*.png")) == ["here-ratios.png"]
    tables.main(["--results", str(results), "--out", str(docs / "benchmarks.md")])
    page = (docs / "benchmarks.md").read_text()
    assert "../benchmarks/results/here-ratios.png" in page and "softmax + top-k, forward" in page


def test_no_page_without_a_kept_run(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tables.main(["--results", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert not (tmp_path / "page.md").exists()
