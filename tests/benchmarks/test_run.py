"""The timer, the arithmetic of the ceilings, and a whole run from the command to the page."""

import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from benchmarks import ceilings, plan, run, scaling, timer
from benchmarks.case import Entry, Floor, Size
from benchmarks.cases import topk
from benchmarks.kept import read_run, read_table, write_run, write_table
from benchmarks.machine import machine
from benchmarks.measure import usable
from benchmarks.report import docs, targets
from benchmarks.report.console import print_result, print_verdicts
from vmoe_routers import _C

CEILINGS = ceilings.Ceilings(
    1e9,
    2e9,
    {"L2": 4e9, "L3": 2e9, "DRAM": 1e9},
    {"L2": 3e9, "L3": 3e9, "DRAM": 1e9},
    1e8,
    {"L2": 10, "L3": 100, "DRAM": 1000},
)


def test_ratios_are_paired_with_the_first_and_times_are_medians():
    twice = iter([2.0, 4.0, 6.0])
    timings, again = timer.paired({"one": lambda: 1.0, "two": lambda: next(twice)}, rounds=3)
    assert (timings["two"].seconds, timings["two"].fastest, timings["two"].ratio.median) == (4, 2, 4)
    assert timings["one"].ratio.median == again.low == again.median == again.high == 1


def test_seconds_are_of_one_call(monkeypatch):
    clock = iter([0.0, 3.0])
    monkeypatch.setattr(timer.time, "perf_counter", lambda: next(clock))
    calls = []
    assert timer.once(lambda: calls.append(1), 6, "cpu") == 0.5 and len(calls) == 6


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
    for wrong, message in (
        (["--rounds", "3"], "at least 15"),
        (["--threads", "two"], "commas between, got 'two'"),
        (["--threads", "0"], "at least 1"),
        (["--only", "nothing"], "invalid choice"),
        (["--isa", "v9"], "has no level 'v9'"),
        (["--quick", "--full"], "not allowed with"),
    ):
        with pytest.raises(SystemExit):
            plan.parse(wrong, "")
        assert message in capsys.readouterr().err


def test_the_kernels_of_the_level_asked_for_are_used():
    best = _C.isa()
    lowest = "v2" if best.startswith("v") else best
    try:
        plan.parse(["--isa", lowest], "")
        assert machine("cpu")["isa"] == lowest
    finally:
        _C.use_isa(best)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    script = """
import resource, torch
from benchmarks.machine import keep_memory
assert keep_memory()
for _ in range(12):  # the first ones may still fault, which depends on the end of the heap
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(pages)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_full_is_memory_and_the_sizes_worth_changing():
    assert plan.parse(["--full"], "").memory
    jobs = list(plan.jobs(plan.parse(["--full", "--threads", "1,2"], "")))
    assert {job.threads for job in jobs} == {1, 2}
    assert all(job.threads == 1 for job in jobs if job.whole or not job.default)
    assert {job.size.experts for job in jobs if job.entry.op == "topk"} == {8, 32, 128}


def test_verdicts_on_time_and_memory():
    def variant(name, ratio, peak):
        same = {"name": name, "role": "peer", "different": "", "seconds": 1.0, "peak_bytes": peak}
        return {**same, "ratio": {"median": ratio}}

    result = {
        "title": "layer, soft",
        "size": "",
        "default": True,
        "threads": 1,
        "direction": "forward",
        "unstable": False,
    }
    variants = [variant("ours", 1.0, 10), variant("bwconrad's form", 0.7, 60), variant("soft-moe-pytorch", 2.0, None)]
    run = {"machine": {"device": "cpu", "name": ""}, "results": [{**result, "variants": variants}]}
    assert {v["against"]: v["factor"] for v in targets.verdicts(run)} == {
        "bwconrad's form": pytest.approx(0.5),
        "soft-moe-pytorch": 1,
        "peak memory of bwconrad's form": 2,
    }


def test_the_reason_for_a_missed_target_is_printed_and_on_the_page(monkeypatch, capsys):
    def verdict(title, against, factor):
        same = {"size": "", "default": True, "threads": 1, "direction": "forward", "unstable": False, "target": 2.0}
        return {**same, "title": title, "against": against, "ratio": 1.0, "factor": factor}

    def said(missed):
        print_verdicts(Console(width=300), [missed])
        assert targets.reason(missed) in capsys.readouterr().out
        monkeypatch.setattr(docs, "verdicts", lambda run: [missed])
        why, page = targets.reason(missed), docs.targets({"machine": {"device": "cpu"}})
        if missed["factor"] < 1:
            number = "1" if why else ""
            assert f"| {missed['against']} | 2 | 1 | {number} |" in page[2] and page[3:] == [f"1. {why}"] * bool(why)
        return why

    missed = [verdict(f"layer, x, K={k}", "best peer: loop", 0.5) for k in (1, 2, 3)]
    assert not any(map(said, missed))
    monkeypatch.setattr(targets, "WHY", {("layer, x", "forward", "best peer"): "Bound by products [all]."})
    assert all(said(v) == "Bound by products [all]." for v in missed)
    assert not said(verdict("layer, x, K=1", "best peer: loop", 1.5)) and not said(
        verdict("layer, x, K=1", "loop", 0.5)
    )
    targets.WHY["layer, x, K=2", "forward", "best peer"] = "Another."
    assert [said(v) for v in missed] == ["Bound by products [all].", "Another.", "Bound by products [all]."]


def test_names_with_brackets_are_printed_whole(capsys):
    numbers = {"seconds": 1.0, "called_seconds": None, "waits": False, "saved_bytes": None, "peak_bytes": None}
    ours = {"name": "ours [a, b]", "role": "ours", "different": "[c]", "ratio": asdict(timer.Ratio(1, 1, 1)), **numbers}
    case = {"title": "op", "direction": "forward", "size": "n=1", "threads": 1, "tolerance": 0, "allowed": 0}
    case |= {"again": asdict(timer.Ratio(1, 1, 1)), "unstable": False, "skipped": ["einsum over [g, t]: large"]}
    print_result(Console(width=160), {**case, "floor": {"seconds": 1.0, "by": "exp"}, "variants": [ours]})
    printed = capsys.readouterr().out
    for words in ("ours [a, b]", "different function: [c]", "skipped einsum over [g, t]: large"):
        assert words in printed


def test_run_writes_results_figures_and_pages(tmp_path, monkeypatch, capsys):
    entry = Entry("topk", topk.build, quick=Size(images=1, tokens=32, experts=4))
    monkeypatch.setattr(plan, "entries", lambda *_: [entry])
    monkeypatch.setattr(scaling, "entries", lambda *_: [entry])
    monkeypatch.setattr(scaling, "AXES", [scaling.Axis("tokens", (64, 256, 512), lambda n: Size(1, n, 4, 8))])
    for module in (run, scaling):
        monkeypatch.setattr(module, "measure_ceilings", lambda *args, **options: CEILINGS)
        monkeypatch.setattr(module, "keep_memory", lambda: False)  # its setting would last for the whole process
    results = tmp_path / "benchmarks" / "results"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"Before.\n{docs.MARKS[0]}\nearlier run\n{docs.MARKS[1]}\nBehind.\n")
    threads = torch.get_num_threads()
    run.main(["--quick", "--only", "topk", "--csv", str(results / "here.csv")])
    scaling.main(["--rounds", "1", "--csv", str(results / "here-scaling.csv")])
    torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "(n=32 T=32 E=4 D=384 K=2, 1 thread(s))" in printed
    for words in ("Targets", "floor / time", "A/A", "1 of 1 cases", "Time against tokens", "Two threads over one"):
        assert words in printed
    report = read_run(results / "here.csv")
    assert [r["direction"] for r in report["results"]] == ["forward", "forward + backward"]
    assert {"isa", "date", "versions"} <= report["machine"].keys()
    docs.main(["--root", str(tmp_path)])
    page, readme = (tmp_path / "docs" / "benchmarks.md").read_text(), (tmp_path / "README.md").read_text()
    assert pictures(page) == {"here-ratios.png", "here-scaling.png"} == files(tmp_path / "docs" / "benchmarks")
    assert "| softmax + top-k |" in page and "### Scaling" in page and docs.NO_GPU in page
    assert readme.startswith("Before.") and readme.endswith("Behind.\n") and "earlier run" not in readme
    assert "| softmax + top-k |" in readme


def pictures(page):
    return {name.split("/")[1] for name in re.findall(r"!\[.*?\]\((benchmarks/.*?)\)", page)}


def files(folder):
    return {path.name for path in folder.iterdir()}


def test_kept_results_are_the_measured_results(tmp_path):
    ratio = {"median": 1.25, "low": 1.0, "high": 2.0}
    variant = {
        "name": "ours",
        "role": "ours",
        "different": "",
        "seconds": 1 / 3,
        "called_seconds": None,
        "waits": False,
    }
    variant |= {"ratio": ratio, "saved_bytes": None, "peak_bytes": 12345678901}
    other = {**variant, "name": 'other, "quoted"', "role": "peer", "different": "another sum", "waits": True}
    floor = {"seconds": 1e-9, "by": "exp", "flops": 0, "bytes": 8, "exps": 1.5}
    result = {"op": "x", "title": "x, one group", "size": "n=1", "default": True, "threads": 2, "direction": "forward"}
    result |= {"floor": floor, "again": {"median": 1.5}, "unstable": False, "skipped": ["peer: too large: 3 MiB"]}
    second = {**result, "default": False, "direction": "forward + backward", "unstable": True, "skipped": []}
    results = [{**result, "variants": [variant, other]}, {**second, "variants": [variant]}]
    report = {"machine": machine("cpu"), "quick": False, "failed": [], "results": results}
    write_run({**report, "targets": ["left out"]}, tmp_path / "run.csv")
    for found in results:
        for v in found["variants"]:
            v["seconds"] = 0.333333
    assert read_run(tmp_path / "run.csv") == report


def test_a_table_keeps_kinds_of_values(tmp_path):
    row = {"a": 1, "b": 0.5, "c": True, "d": None, "e": "text", "f": 1e-12}
    write_table(tmp_path / "new" / "table.csv", {"about": [1, 2 / 3]}, row, [row, {**row, "c": False}])
    about, rows = read_table(tmp_path / "new" / "table.csv")
    assert about == {"about": [1, 0.666667]} and rows == [row, {**row, "c": None}]


def test_kept_scaling_is_the_measured_scaling(tmp_path):
    gain = {"median": 1.5, "low": 1.25, "high": 2.0}
    at = {"title": "x", "seconds": {"1": 1.0, "2": 0.5}, "gain": gain, "unstable": False}
    points = [{**at, "x": x, "seconds": {"1": x / 2, "2": x / 4}} for x in (2, 4, 8)]
    gains = [{**at, "op": "topk", "size": "n=1", "by": "exp", "unstable": True}]
    scaling.write_scaling(
        {"seconds": 1.5, "curves": [scaling.curve("topk", "tokens", points)], "gains": gains}, tmp_path / "scaling.csv"
    )
    found = scaling.read_scaling(tmp_path / "scaling.csv")
    (curve,) = found["curves"]
    assert (found["seconds"], curve["expected"], curve["unstable"]) == (1.5, 1, False)
    assert curve["slope"] == {"1": pytest.approx(1), "2": pytest.approx(1)}
    assert [p["x"] for p in curve["points"]] == [2, 4, 8] and curve["points"][1].items() >= points[1].items()
    assert len(found["gains"]) == 1 and found["gains"][0].items() >= gains[0].items()


def test_a_failed_case_does_not_stop_later_cases(tmp_path, monkeypatch, capsys):
    def broken(size, device):
        raise RuntimeError("no such kernel")

    small = Size(images=1, tokens=32, experts=4)
    good, bad = Entry("topk", topk.build, quick=small), Entry("topk", broken, quick=small)
    monkeypatch.setattr(plan, "entries", lambda *_: [bad, good])
    monkeypatch.setattr(run, "measure_ceilings", lambda *args, **options: CEILINGS)
    with pytest.raises(SystemExit, match=r"failed: topk \[n=32"):
        run.main(["--quick", "--csv", str(tmp_path / "run.csv")])
    report = read_run(tmp_path / "run.csv")
    assert len(report["results"]) == 2 and "no such kernel" in report["failed"][0]["error"]
    assert "no such kernel" in capsys.readouterr().err


def test_an_interrupted_run_keeps_its_results(tmp_path, monkeypatch):
    def cut_off(size, device):
        raise KeyboardInterrupt

    small = Size(images=1, tokens=32, experts=4)
    monkeypatch.setattr(plan, "entries", lambda *_: [Entry("topk", b, quick=small) for b in (topk.build, cut_off)])
    monkeypatch.setattr(run, "measure_ceilings", lambda *args, **options: CEILINGS)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--quick", "--csv", str(tmp_path / "run.csv")])
    assert len(read_run(tmp_path / "run.csv")["results"]) == 2


def test_on_a_gpu_a_form_without_a_kernel_is_skipped_and_a_wrong_one_is_not():
    case = topk.build(Size(images=1, tokens=32, experts=4), "cpu")
    ours, other = case.variants[0], case.variants[2]

    def fails(error):
        def call():
            raise error

        return replace(case, variants=(ours, replace(other, call=call)))

    skipped = []
    assert usable(fails(RuntimeError("not implemented")), "forward", skipped, "cuda") == [ours]
    assert skipped == [f"{other.name}: not implemented"]
    for error, device in ((RuntimeError(), "cpu"), (AssertionError(), "cuda")):
        with pytest.raises(type(error)):
            usable(fails(error), "forward", [], device)


def test_on_cuda_batches_of_vit_b_are_measured():
    jobs = list(plan.jobs(plan.parse(["--device", "cuda"], "")))
    assert all(job.default and job.size in job.entry.cuda for job in jobs)
    assert "n=50176 T=196 E=32 D=768 K=1 bfloat16" in {str(job.size) for job in jobs if job.entry.op == "topk"}
    assert any(job.entry.only_cuda for job in jobs)
    assert not any(job.entry.only_cuda for job in plan.jobs(plan.parse([], "")))
    quick = list(plan.jobs(plan.parse(["--device", "cuda", "--quick"], "")))
    assert {job.size for job in quick} <= {job.size for job in jobs} and len(quick) < len(jobs) / 2
    swept = list(plan.jobs(plan.parse(["--device", "cuda", "--sweep", "--only", "topk"], "")))
    assert {(job.size.images, job.size.experts) for job in swept if not job.default} == {(256, 8), (256, 128)}


def test_torch_compile_has_its_time():
    def until(*arguments):
        return plan.parse(list(arguments), "").compile_until

    assert until() == until("--device", "cuda") == float("inf")
    assert until("--quick") is until("--no-compile") is until("--quick", "--device", "cuda", "--no-compile") is None
    before = time.perf_counter()
    end = until("--quick", "--device", "cuda")
    assert before <= end - plan.COMPILING <= time.perf_counter()


def test_pages_are_what_the_kept_results_say():
    kept = docs.Kept(docs.ROOT / "benchmarks" / "results")
    for path, text in docs.pages(docs.ROOT, kept).items():
        assert path.read_text() == text, f"{path.name}: run python -m benchmarks.report.docs"
    page = docs.document(kept)
    assert pictures(page) == files(docs.ROOT / "docs" / "benchmarks")
    assert len(page.splitlines()) < 200, "the page is to be read in five minutes"


def test_readme_has_six_rows_and_the_page_marks_where_another_form_is_faster():
    kept = docs.Kept(docs.ROOT / "benchmarks" / "results")
    for kept_run in kept.main.values():
        assert docs.ratios(kept_run, [], docs.README_CASES).count("\n| ") == 2 + len(docs.README_CASES)
        slower = [r for r in docs.shown(kept_run) if docs.best(r) and docs.best(r)["ratio"]["median"] < 1]
        assert slower and all(docs.lead(r).startswith("**0.") for r in slower)
        assert all(docs.lead(r) in docs.document(kept) for r in slower)


def test_slope_is_of_the_larger_half():
    assert scaling.slope([1, 10, 100, 1000, 1e4, 1e5], [5, 5, 5, 10, 100, 1000]) == pytest.approx(1)
    assert scaling.slope([1, 10], [1, 100]) == pytest.approx(2)
