"""Records on disk: their folders, and the files that count as a record."""

import copy
import json
import math
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from records import study as made_up_runs
from test_runs import TINY, made_up

from vmoe_routers.study import Variant, figures, study, variants
from vmoe_routers.study.columns import write_csv
from vmoe_routers.study.records import (
    RecordError,
    evaluated_epochs,
    fingerprint,
    read_record,
    read_run,
    run_path,
    run_record,
    timing_path,
    timing_record,
    write_record,
)
from vmoe_routers.study.report import write_report
from vmoe_routers.study.runs import run
from vmoe_routers.study.summary import summarise
from vmoe_routers.study.timing import ROUNDS, time_steps

pytestmark = pytest.mark.usefixtures("one_thread")

EXPERT_CHOICE = Variant("softmax_expert_choice", 1.0)


def test_a_record_is_stored_where_its_settings_say():
    soft = Variant("soft", 1.0)
    path = run_path(TINY, "inputs", soft, 0)
    assert path.parent == Path("study/runs") and path.name.startswith("soft-c1-seed0-")
    for same in (
        {"routers": ["soft"]}, {"seeds": 9}, {"workers": 3}, {"top_k": [1]}, {"capacity_factors": [2.0]},
        {"plan_combine": False}, {"data": "x"}, {"transfer_data": "digits"}, {"batch_priority": True},
        {"ablations": ["noise"]}, {"save_models": True}, {"learning_rates": {"dense": 1e-3}},
    ):  # fmt: skip
        assert run_path(replace(TINY, **same), "inputs", soft, 0) == path
    there = replace(TINY, output=Path("there"))
    assert run_path(there, "inputs", soft, 0) == Path("there/runs") / path.name
    others = [
        {"epochs": 3}, {"batch_size": 8}, {"learning_rate": 1e-3}, {"learning_rates": {"soft": 1e-4}}, {"holdout": 3},
        {"image_size": 4}, {"max_images": 5}, {"shift": 0}, {"patch_size": 4}, {"width": 32}, {"mlp_ratio": 1.0},
        {"depth": 4}, {"heads": 4}, {"num_experts": 8}, {"group_size": 2}, {"scale_init": 1.0}, {"device": "cuda"},
        {"moe_blocks": "every_2", "depth": 4}, {"holdout": 3, "choosing": True}, {"identical_experts": True},
    ]  # fmt: skip
    paths = [run_path(replace(TINY, **other), "inputs", soft, 0) for other in others]
    paths += [path, run_path(TINY, "inputs", soft, 1), run_path(TINY, "others", soft, 0)]
    paths += [run_path(TINY, "inputs", variant, 0) for variant in (Variant(), Variant("soft", 2.0))]
    assert len({path.stem[-12:] for path in paths}) == len(others) + 5


def test_the_timing_is_stored_by_its_models():
    pair = [Variant(), Variant("soft", 1.0)]
    paths = {
        timing_path(TINY, "inputs", pair), timing_path(TINY, "inputs", pair[:1]), timing_path(TINY, "others", pair),
        timing_path(replace(TINY, width=32), "inputs", pair),
    }  # fmt: skip
    assert len(paths) == 3 and all(path.name.startswith("steps-") for path in paths)
    assert timing_path(replace(TINY, seeds=5), "inputs", pair) in paths


def test_fingerprint_is_of_the_images():
    data, other = made_up(), made_up(seed=1)
    assert fingerprint(data, None) == fingerprint(made_up(), None)
    labels = data.train_labels.clone()
    labels[3] += 1
    different = [
        fingerprint(data, None), fingerprint(other, None), fingerprint(data, other), fingerprint(other, data),
        fingerprint(made_up(train=15, test=11), None), fingerprint(replace(data, train_labels=labels), None),
    ]  # fmt: skip
    assert len(set(different)) == 6


@pytest.mark.parametrize(("epochs", "wanted"), [(1, [1]), (2, [2]), (3, [1, 3]), (6, [2, 4, 6])])
def test_evaluated_epochs(epochs, wanted):
    assert list(evaluated_epochs(epochs)) == wanted


@pytest.fixture(scope="module")
def record():
    return json.loads(json.dumps(run(TINY, EXPERT_CHOICE, 0, made_up(), None)))


@pytest.fixture
def path(tmp_path, record):
    write_record(tmp_path / "runs" / "record.json", record)
    return tmp_path / "runs" / "record.json"


WANTED = run_record(TINY, EXPERT_CHOICE, 0, None)


def refused(path, words, wanted=WANTED):
    with pytest.raises(RecordError, match=words) as error:
        read_record(path, wanted)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_is_written_is_a_record(path, record):
    assert read_record(path, WANTED) == record and [path] == list(path.parent.iterdir())
    assert read_record(path.with_name("other"), WANTED) is None
    diverged = copy.deepcopy(record)
    diverged["epochs"][0] |= {"loss": math.nan, "train_loss": math.inf}
    write_record(path, diverged | {"more": "of a later version"})
    assert math.isnan(read_record(path, WANTED)["epochs"][0]["loss"])


def test_only_a_run_that_diverged_may_end_early(path, record):
    early = copy.deepcopy(record) | {"epochs": []}
    write_record(path, early)
    with pytest.raises(RecordError, match=r"epochs is a list of 0, wanted a list of 1"):
        read_run(path, TINY, EXPERT_CHOICE, 0, None)
    write_record(path, early | {"diverged": "at once"})
    assert read_run(path, TINY, EXPERT_CHOICE, 0, None)["diverged"] == "at once"


@pytest.mark.parametrize("content", [
    b"", b'{"variant": {"na', b"\xff\xfe\x00garbage", b"[]", b"{}", b"null", b"true", b"3", b'"text"', b"[[]]",
    b"[" * 100_000, b'{"epochs":' * 100_000, b"1" * 5000,
], ids=lambda content: str(content[:12]))  # fmt: skip
def test_what_is_no_record(path, content):
    path.write_bytes(content)
    refused(path, "no record, ")


@pytest.mark.parametrize(("place", "value", "words"), [
    (("epochs",), [1, 2], r"epochs is a list of 2, wanted a list of 1"),
    (("final",), {}, "accuracy is missing in final"),
    (("diverged",), True, "diverged is True, wanted null or a text"),
    (("settings", "width"), 17, "settings.width is 17, wanted 16"),
    (("epochs",), {}, r"epochs is \{\}, wanted a list of 1"),
    (("epochs",), [[]], r"epochs\[0\] is \[\], wanted a mapping"),
    (("epochs", 0), {}, r"epoch is missing in epochs\[0\]"),
    (("epochs", 0, "epoch"), 1, r"epochs\[0\]\.epoch is 1, wanted 2"),
    (("epochs", 0, "loss"), "0.3", r"epochs\[0\]\.loss is '0.3', wanted a number"),
    (("epochs", 0, "loss"), None, "wanted a number"),
    (("epochs", 0, "loss"), True, "is True, wanted a number"),
    (("epochs", 0, "loss"), 10**400, "wanted a number"),
    (("epochs", 0, "accuracy"), 1.5, r"wanted a number in \[0, 1\]"),
    (("epochs", 0, "seconds"), math.inf, "wanted a time"),
    (("variant",), "dense", "variant is 'dense', wanted a mapping"),
    (("variant", "label"), "<b>", "variant.label is '<b>', wanted 'Softmax Expert Choice'"),
    (("variant", "capacity_factor"), 2.0, "capacity_factor is 2.0, wanted 1.0"),
    (("seed",), 1, "seed is 1, wanted 0"),
    (("seed",), False, "seed is False, wanted 0"),
    (("steps",), 0, "steps is 0, wanted a positive number"),
    (("cost", "mlp_flops"), 0.0, "cost.mlp_flops is 0.0, wanted a positive number"),
    (("layers",), [], r"layers is \[\], wanted a list of 1"),
    (("layers", 0, "load"), [1.0], r"layers\[0\].load is a list of 1, wanted a list of 4"),
    (("layers", 0, "load", 2), "x" * 500, r"layers\[0\].load\[2\] is 'xxx.*\.\.\., wanted a number"),
    (("layers", 0, "dead_experts"), -1, "wanted a count"),
    (("transfer",), {"data": "digits", "accuracy": 1}, "transfer is a mapping of 2, wanted None"),
    (("machine",), [], "machine is .., wanted a description in words"),
    (("machine",), {"CPU": []}, "wanted a description in words"),
    (("date",), 3, "date is 3, wanted a text"),
])  # fmt: skip
def test_what_a_record_must_hold(path, record, place, value, words):
    changed = copy.deepcopy(record)
    inner = changed
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    write_record(path, changed)
    refused(path, words)


def test_every_part_of_a_record_is_wanted(path, record):
    for key in record:
        write_record(path, {name: value for name, value in record.items() if name != key})
        refused(path, f"{key} is missing in the whole")


def test_a_record_of_a_transfer(path, record):
    refused(path, "transfer is None, wanted a mapping", run_record(TINY, EXPERT_CHOICE, 0, "digits"))
    write_record(path, record | {"transfer": {"data": "digits", "accuracy": 0.5}})
    assert read_record(path, run_record(TINY, EXPERT_CHOICE, 0, "digits"))


def test_every_variant_writes_what_its_record_must_hold(tmp_path):
    for variant in variants(replace(TINY, top_k=[1])):
        write_record(tmp_path / "a.json", run(TINY, variant, 1, made_up(), None))
        assert read_record(tmp_path / "a.json", run_record(TINY, variant, 1, None))


def test_records_of_the_timing(tmp_path):
    path = tmp_path / "steps.json"
    timing = study.Timing([Variant(), EXPERT_CHOICE], path)
    assert timing.read() is None
    record = time_steps(TINY, timing.variants, made_up())
    write_record(path, record)
    assert timing.read() == record
    assert study.Timing([Variant("soft", 1.0)], path).read() is None  # a valid record, but of other variants
    for times in ([], [1.0] * (ROUNDS - 1), [0.0] * ROUNDS, ["1"] * ROUNDS, None, 3):
        write_record(path, record | {"step_ms": record["step_ms"] | {"dense": times}})
        refused(path, f"wanted {ROUNDS} positive numbers for every variant", timing_record(ROUNDS))
    write_record(path, record | {"step_ms": []})
    refused(path, "step_ms is", timing_record(ROUNDS))


def test_only_a_regular_file_of_some_size_is_a_record(path, monkeypatch):
    monkeypatch.setattr("vmoe_routers.study.records._MAX_BYTES", 10)
    refused(path, "no record, .* bytes, wanted at most 10")
    path.unlink()
    os.mkfifo(path)
    refused(path, "not a regular file")
    path.unlink()
    path.mkdir()
    refused(path, "not a regular file")


def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(tmp_path):
    """A limit on the size of files fails a write in the middle, as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    written = {
        "record.json": lambda path: write_record(path, {"loss": [0.5] * 10_000}),
        "table.csv": lambda path: write_csv(summarise(made_up_runs(3)), path),
        "figure_1.csv": lambda path: figures.save(path.parent, "figure_1", Figure(), [{"a": "x" * 5000}]),
        "figure_2.png": lambda path: figures.save(path.parent, "figure_2", Figure(), [{"a": 1}]),
        "report.html": lambda path: write_report(path.parent, [], {}),
    }
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for name, write in written.items():
            with pytest.raises(OSError, match=name) as error:
                write(tmp_path / name)
            assert error.value.filename == str(tmp_path / name)
            assert not (tmp_path / name).exists() and not list(tmp_path.glob("*.partial"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
