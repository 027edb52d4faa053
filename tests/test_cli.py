"""The command line: options, errors in one line, Ctrl-C; the one place where a study is run as users run it."""

import contextlib
import dataclasses
import os
import random
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmoe_routers import cli
from vmoe_routers.study import Settings

pytestmark = pytest.mark.usefixtures("one_thread")

# Six runs of less than a second
TINY = (
    "--routers soft --seeds 3 --epochs 6 --width 16 --depth 2 --heads 2 --num-experts 4 --group-size 4 --batch-size 16"
)


@pytest.mark.parametrize(("arguments", "changes"), [
    ("", {}),
    ("--routers soft", {"routers": ["soft"]}),
    ("--routers soft,softmax_expert_choice", {"routers": ["soft", "softmax_expert_choice"]}),
    ('--routers ["soft","softmax_expert_choice"]', {"routers": ["soft", "softmax_expert_choice"]}),
    ("--routers=[soft]", {"routers": ["soft"]}),
    ("--routers=", {"routers": []}),
    ("--top-k 2 --capacity-factors .5,1", {"top_k": [2], "capacity_factors": [0.5, 1.0]}),
    ("--top_k=1,2,4 --capacity_factors=2", {"top_k": [1, 2, 4], "capacity_factors": [2.0]}),
    ("--data a-b/c_d --output=x-y=z", {"data": "a-b/c_d", "output": Path("x-y=z")}),
    ("--transfer-data digits --plan-combine false", {"transfer_data": "digits", "plan_combine": False}),
    ("--image-size 14 --max_images 2000 --learning-rate 1e-3",
     {"image_size": 14, "max_images": 2000, "learning_rate": 1e-3}),
])  # fmt: skip
def test_options(arguments, changes):
    assert cli._parse(["study", *arguments.split()]) == Settings(**changes)


def test_options_of_convert():
    options = cli._parse(["convert", "P", "folder", "--router", "soft", "--top-k", "3", "--group-size=4"])
    assert isinstance(options, dict)
    assert (options["router"], options["top_k"], options["group_size"]) == ("soft", 3, 4)


@pytest.mark.parametrize(("arguments", "words"), [
    ("study --routers hard", "no router 'hard'; there are softmax_token_choice"),
    ("study --data nowhere", "no folder 'nowhere'"),
    ("study --batch-size 30", "batch_size 30 must be a multiple of group_size 8"),
    ("study --seeds many", "many"),
    ("study --top-k one", "one"),
    ("study --colour red", "--colour red"),
    ("study --device cuda", "torch finds no CUDA here"),
    ("study --max-images 200 --output /dev/null/x", "/dev/null/x"),
    ("convert", "convert.source"),
    ("convert nowhere folder", "nowhere.index: there is no such file"),
    ("train", "train"),
    ("", "study"),
])  # fmt: skip
def test_errors_are_one_line(capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vmoe-routers: ") and words in err and err.count("\n") == 1 and err.endswith("\n")
    assert out == ""


def test_a_missing_package_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    assert cli.main(["study"]) == 2
    err = capsys.readouterr().err
    assert "jsonargparse" in err and "pip install 'vmoe_routers[study]'" in err and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["study", "--help"], ["convert", "--help"], ["--version"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    if arguments[0] == "study":
        assert all(f"--{field.name}" in out for field in dataclasses.fields(Settings))
    else:
        assert "study" in out or "from_pretrained" in out or out.startswith("vmoe-routers ")


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    assert true()


def alone(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_ctrl_c_and_the_same_command_again(tmp_path, capfd):
    for part in ("train", "t10k"):
        header, labels = (
            struct.pack(">4I", 0x803, 400, 8, 8),
            struct.pack(">2I400B", 0x801, 400, *range(10), *[3] * 390),
        )
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + random.Random(part).randbytes(400 * 8 * 8))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(labels)
    arguments = ["study", "--data", str(tmp_path), "--output", str(tmp_path), "--workers", "1", *TINY.split()]
    records = tmp_path / "runs"
    # A session of its own, as in a terminal: Ctrl-C there is a signal to all its processes.
    process = subprocess.Popen(
        [sys.executable, "-m", "vmoe_routers", *arguments],
        start_new_session=True,
        # Where the tests run in the background of a script, Ctrl-C is ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        wait_until(lambda: list(records.glob("*.json")) or process.poll() is not None)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        out, err = capfd.readouterr()
        assert err == "" and "interrupted; what is finished is kept" in out and "Traceback" not in out
        wait_until(lambda: alone(process.pid), 20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 1 <= len(done) < 6

    assert cli.main(arguments) == 0
    out, err = capfd.readouterr()
    assert err == "" and f"runs: 6, done before: {len(done)}" in out
    epochs = 36 - 6 * len(done)
    assert out.count("  acc. ") == 6 - len(done) and f"{epochs}/{epochs} epochs" in out and "28/28 rounds" in out
    assert "report: " in out and (tmp_path / "report.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in done} == done and len(list(records.glob("*-seed*.json"))) == 6
