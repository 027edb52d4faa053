"""A benchmark run on a fake GPU: tensors are on the CPU, and a clock replaces CUDA events."""

import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks import ceilings, measure, plan, run, timer
from benchmarks.case import FORWARD, Size
from benchmarks.cases import entries
from benchmarks.kept import read_run
from benchmarks.report import docs, targets

TINY = Size(images=2, tokens=48, experts=4, width=16, top_k=1)
RATES = {"L2": 2e12, "DRAM": 1e12}
CEILINGS = ceilings.Ceilings(1e12, 1e12, RATES, RATES, 1e12, {"L2": 1 << 20, "DRAM": 1 << 22}, 2e12)


class OnTheCpu(TorchFunctionMode):
    """A mode that makes tensors for "cuda" on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Event:
    """An event that records the time of a clock. Its query answers True, or False if `slow`."""

    slow = True

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return not self.slow

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.fixture
def gpu(monkeypatch):
    waits = []
    for name, stand_in in {
        "Event": Event,
        "synchronize": lambda: None,
        "_sleep": waits.append,
        "get_device_name": lambda: "NVIDIA H200",
        "get_device_properties": lambda: SimpleNamespace(L2_cache_size=1 << 20),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(ceilings, "GPU_MEMORY", 1 << 22)
    monkeypatch.setattr(ceilings, "GPU_PRODUCT", 64)
    with OnTheCpu():
        yield waits


@pytest.fixture
def calls(monkeypatch):
    """Makes a call that takes the given seconds on a fake clock. The clock counts the calls."""
    times = []

    def call_of(seconds):
        monkeypatch.setattr(time, "perf_counter", lambda: seconds * len(times))
        return times, lambda: times.append(seconds)

    return call_of


def test_calls_are_queued_while_the_gpu_waits(gpu, calls, monkeypatch):
    times, call = calls(1e-4)
    queued = timer.Queued(call)
    before = len(times)
    assert queued() == pytest.approx(1e-4)
    repeats = len(times) - before
    assert repeats in (10, 11)  # the repeats take a millisecond in all
    assert gpu == [pytest.approx(2 * repeats * 1e-4 * 2e9)]  # the cycles of twice the launch time
    assert not queued.waits
    monkeypatch.setattr(Event, "slow", False)
    queued(), queued()
    assert queued.waits


def test_a_call_that_waits_for_the_gpu_does_not_keep_it_waiting_for_long(gpu, calls):
    timer.Queued(calls(0.2)[1])()
    assert gpu == [2 * 0.05 * 2e9]


def test_the_ceilings_of_a_gpu_include_its_memory_and_bfloat16_products(gpu):
    found = ceilings.measure_ceilings("cuda", quick=True)
    assert list(found.read) == list(found.copy) == ["L2", "DRAM"] and found.gemm_bfloat16 > 0
    floor = ceilings.Floor(flops=1e9, dtype="bfloat16")
    assert found.floor(floor)["seconds"] == pytest.approx(1e9 / found.gemm_bfloat16)
    assert found.floor(replace(floor, dtype="float32"))["seconds"] == pytest.approx(1e9 / found.fastest_gemm)
    assert found.at_least(replace(found, gemm_bfloat16=1e30)).gemm_bfloat16 == 1e30


@pytest.mark.filterwarnings("ignore")  # warnings of the packages to compare with
def test_a_quick_run_has_all_targets_and_its_page_says_where_it_ran(gpu, tmp_path, monkeypatch, capsys):
    # Builds every case of a quick run at a tiny size, and gives the case its real size as its label.
    small = []
    for entry in entries(device="cuda"):
        if entry.cuda_quick:
            sizes = {size: replace(TINY, dtype=size.dtype, top_k=size.top_k) for size in entry.cuda_quick}

            def build(size, device, entry=entry, sizes=sizes):
                return replace(entry.build(sizes[size], device), size=size)

            small.append(replace(entry, build=build))
    monkeypatch.setattr(plan, "entries", lambda *_: small)
    monkeypatch.setattr(run, "measure_ceilings", lambda *args, **options: CEILINGS)
    monkeypatch.setattr(timer.Queued, "LEAST", 1e-5)
    monkeypatch.setattr(timer, "bootstrap", partial(timer.bootstrap, draws=40))
    monkeypatch.setattr(measure, "paired", lambda calls, rounds: timer.paired(calls, rounds=2))
    monkeypatch.setattr(
        measure, "measure", lambda calls, rounds, device: timer.measure(calls, rounds=2, least=1e-5, device=device)
    )
    results = tmp_path / "benchmarks" / "results"
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("\n".join(docs.MARKS))
    arguments = ["--device", "cuda", "--quick", "--no-compile", "--csv", str(results / "gpu.csv")]
    run.main(arguments)
    report = read_run(results / "gpu.csv")
    assert not report["failed"]
    due = {(v["direction"], v["against"], v["size"]) for v in targets.verdicts(report)}
    assert due == {(aim.direction, aim.against, str(aim.size)) for aim in targets.AIMS if aim.device == "cuda"}
    printed = capsys.readouterr().out
    for words in ("L2 cache is warm", "of a call", "bfloat16 8192^3", "us, at most (H200)", "skipped triton"):
        assert words in printed
    docs.main(["--root", str(tmp_path)])
    page, readme = (tmp_path / "docs" / "benchmarks.md").read_text(), (tmp_path / "README.md").read_text()
    assert "## NVIDIA H200\n" in page and docs.NO_GPU not in page and "in bfloat16" in page and "ISA" not in page
    assert "L2 cache is warm" in page and "| of a call |" in page
    assert readme.startswith(docs.MARKS[0] + "\nNVIDIA H200 (")
    assert re.search(r"\| softmax \+ top-k \| [^|]*n=50176[^|]* \| torch", readme)


def test_nothing_is_compiled_when_its_time_is_over(gpu, monkeypatch, capsys):
    entry = next(entry for entry in entries(device="cuda") if entry.cuda_quick)
    monkeypatch.setattr(plan, "entries", lambda *_: [replace(entry, cuda_quick=(TINY,))])
    monkeypatch.setattr(plan, "COMPILING", 0)
    monkeypatch.setattr(run, "measure_ceilings", lambda *args, **options: CEILINGS)
    run.main(["--device", "cuda", "--quick"])
    assert "skipped torch.compile: no time left in a quick run" in capsys.readouterr().out


def result(title, size, seconds, **more):
    same = {"title": title, "size": str(size), "threads": 1, "default": True, "unstable": False, "direction": FORWARD}
    ours = {"name": "ours", "role": "ours", "different": "", "seconds": seconds, "ratio": {"median": 1.0}}
    return {**same, "floor": {"bytes": 8e6}, "variants": [ours], **more}


def verdicts(card, *results):
    machine = {"device": "cuda", "name": card}
    rates = [{"threads": 1, "ceilings": {"copy": {"DRAM": 4e12}}}]
    return {
        (v["title"], v["against"]): v["factor"]
        for v in targets.verdicts({"machine": machine, "ceilings": rates, "results": list(results)})
    }


def test_verdicts_on_a_gpu():
    title, T, size = "softmax + top-k", targets, targets.VIT_B
    forward, both = result(title, size, 10e-6), result(title, size, 14e-6, direction=T.BACKWARD)
    assert verdicts("NVIDIA H100 80GB HBM3", forward, both) == {
        (title, "us, at most (H100, H200)"): pytest.approx(0.5),
        (title, "us more than forward, at most (H100, H200)"): pytest.approx(1.5),
    }
    assert not verdicts("NVIDIA H100", both), "without the forward there is nothing to compare with"
    assert not verdicts("NVIDIA A100", forward), "a target in seconds applies to the named cards only"
    assert not verdicts("NVIDIA H100", result(title, replace(size, top_k=2), 1e-6))
    # 8 MB in 4 us are half of the copy bandwidth, on any card.
    assert verdicts("NVIDIA A100", result(title, T.MILLION, 4e-6)) == {
        (title, "of copy bandwidth"): pytest.approx(0.5 / 0.7)
    }


def test_a_target_of_one_card_applies_to_that_card_only():
    mixing = result("Soft MoE mixing", targets.SQUARE_BFLOAT16, 100e-6)
    assert verdicts("NVIDIA H200", mixing) == {("Soft MoE mixing", "us, at most (H200)"): pytest.approx(1.5)}
    assert not verdicts("NVIDIA H100", mixing)
