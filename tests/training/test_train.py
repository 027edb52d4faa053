"""train: a whole training, its files, and what happens when it is interrupted at any moment."""

import csv
import errno
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import parity
import pytest
import torch
import yaml
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

import vmoe_routers as vr
import vmoe_routers.training.trainer as trainer_module
from tests.training.made import idx_folder, picture_folder
from vmoe_routers.checkpoints import from_pretrained
from vmoe_routers.options import OptionError
from vmoe_routers.training import RECIPES, TrainSettings, checkpoint, evaluate, train
from vmoe_routers.training.checkpoint import TrainingCheckpointError
from vmoe_routers.training.describe import memory_estimate
from vmoe_routers.training.evaluation import Evaluation
from vmoe_routers.training.layout import lay_out
from vmoe_routers.training.log import Board, Outputs, Table, read_table
from vmoe_routers.training.models import load_model
from vmoe_routers.training.processes import World
from vmoe_routers.training.settings import read_settings
from vmoe_routers.training.sources import open_data

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
OPTIONS = {
    "model_args": SMALL,
    "router": "softmax_token_choice",
    "num_experts": 4,
    "group_size": 2,
    "scale": None,
    "hflip": 0.0,
    "shift": 1,
    "batch_size": 256,  # 5 steps an epoch
    "epochs": 2,
    "save_every": 2,
    "log_every": 1,
    "workers": 0,
}
TIMES = {"images_per_second", "data_wait"}


def run(output, console=None, **changes):
    return train(TrainSettings(**{**OPTIONS, "output": output, **changes}), console=console or Console(quiet=True))


def rows(path):
    with open(path, newline="") as file:
        return [{name: v for name, v in row.items() if name not in TIMES} for row in csv.DictReader(file)]


def result(output):
    return (output / "model/model.safetensors").read_bytes(), rows(output / "log.csv"), rows(output / "evaluations.csv")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("train") / "out"
    with open(output.with_suffix(".txt"), "w") as file:
        assert run(output, Console(file=file, width=100)) == output / "model"
    torch.set_num_threads(threads)
    return output


def test_files(undisturbed):
    _, log, evaluations = result(undisturbed)
    assert [int(row["step"]) for row in log] == list(range(1, 11))
    assert [int(row["step"]) for row in evaluations] == [5, 10]
    assert all(float(row["loss"]) > 0 and float(row["dropped"]) >= 0 for row in log)
    assert {path.name for path in (undisturbed / "checkpoints").iterdir()} >= {"00000008", "00000010"}
    assert (undisturbed / "curve.png").read_bytes()[1:4] == b"PNG"
    if find_spec("tensorboard"):
        (events,) = (undisturbed / "tensorboard").iterdir()
        assert events.read_bytes().count(b"routing/blocks.1.mlp/entropy") == 10
    assert (
        TrainSettings(**read_settings(undisturbed / "settings.yaml")).to_dict()
        == TrainSettings(**{**OPTIONS, "output": undisturbed}).to_dict()
    )
    model = from_pretrained(undisturbed / "model")
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    told = undisturbed.with_suffix(".txt").read_text()
    assert "1,437 training and 360 test images" in told and f"vmoe-routers eval --model {undisturbed}/model" in told


def test_eval_sees_what_the_training_saw(undisturbed, tmp_path):
    """The model's configuration has crop and normalization, also without the training's settings."""
    silent, model = Console(quiet=True), tmp_path / "moved"
    shutil.copytree(undisturbed / "model", model)
    found = evaluate(str(model), output=tmp_path, workers=0, device="cpu", console=silent)
    last = rows(undisturbed / "evaluations.csv")[-1]
    assert found.top1 == pytest.approx(float(last["top1"]), rel=1e-5)
    assert found.loss == pytest.approx(float(last["loss"]), rel=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_evaluate_images_at_the_size_of_the_training(recipe):
    """A random crop enlarges the contents of an image, and so does the central crop of evaluation. A shift does not."""
    settings = RECIPES[recipe]()
    assert (settings.scale is None) == (settings.crop_pct == 1)


class Stop(Exception):
    pass


def stop_at(monkeypatch, step, action):
    """Calls `action` before the given step."""
    call = trainer_module.Trainer.__call__

    def counted(self, images, targets):
        if self.step == step:
            action()
        return call(self, images, targets)

    monkeypatch.setattr(trainer_module.Trainer, "__call__", counted)


def raise_stop():
    raise Stop


@pytest.mark.parametrize("step", [1, 3, 7])
def test_an_interrupted_training_continues_bit_for_bit(step, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, step, raise_stop)
        run(tmp_path)
    run(tmp_path, workers=2 if step == 3 else 0)
    assert result(tmp_path) == result(undisturbed)


def test_killed_processes_continue_bit_for_bit(undisturbed, tmp_path):
    options = {**OPTIONS, "output": str(tmp_path)}
    code = f"from vmoe_routers.training import train; train(**{options!r})"
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not checkpoint.saved(tmp_path / "checkpoints") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.saved(tmp_path / "checkpoints")
    run(tmp_path)
    assert result(tmp_path) == result(undisturbed)


def test_ctrl_c_saves_and_says_how_to_go_on(undisturbed, tmp_path, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores the signal
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), open(tmp_path / "told", "w") as file:
        stop_at(patch, 2, lambda: os.kill(os.getpid(), signal.SIGINT))
        run(tmp_path / "out", Console(file=file, width=200))
    assert "interrupted; saved at step 3, and the same command continues" in (tmp_path / "told").read_text()
    assert checkpoint.saved(tmp_path / "out/checkpoints")[-1].name == "00000003"
    assert signal.getsignal(signal.SIGINT) is before
    run(tmp_path / "out")
    assert result(tmp_path / "out") == result(undisturbed)


def test_two_interrupts_end_at_once(tmp_path, monkeypatch):
    def twice():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)

    stop_at(monkeypatch, 2, twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert checkpoint.saved(tmp_path / "checkpoints")[-1].name == "00000002"


def damage(path, how):
    data = max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)
    if how == "truncated":
        data.write_bytes(data.read_bytes()[:-100])
    elif how == "missing":
        data.unlink()
    elif how == "zeros":
        data.write_bytes(bytes(data.stat().st_size))
    else:
        (path / "training.json").write_text("{}")


@pytest.mark.parametrize("how", ["truncated", "missing", "zeros", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(how, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    damage(tmp_path / "out/checkpoints/00000010", how)
    with open(tmp_path / "told", "w") as file:
        run(tmp_path / "out", Console(file=file, width=400))
    told = (tmp_path / "told").read_text()
    assert "00000010" in told and "trying the previous checkpoint" in told and "continues from step 8 of 10" in told
    assert result(tmp_path / "out") == result(undisturbed)


def test_only_damaged_checkpoints(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    for path in checkpoint.saved(tmp_path / "out/checkpoints"):
        damage(path, "foreign")
    with pytest.raises(TrainingCheckpointError, match="no checkpoint can be read; delete the folder"):
        run(tmp_path / "out")


@pytest.mark.parametrize(("method", "name"), [("rename", "00000010.partial"), ("write_text", "training.json")])
def test_a_full_disk_keeps_the_previous_checkpoint(method, name, undisturbed, tmp_path, monkeypatch):
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints/00000010")
    (tmp_path / "checkpoints/00000009.partial").mkdir()  # of a process that was killed
    original = getattr(Path, method)

    def full(self, *arguments):
        if self.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")  # an error of `write` does not name the file
        return original(self, *arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match=r"checkpoints/00000010: cannot be written: .*No space left on device"),
    ):
        patch.setattr(Path, method, full)
        run(tmp_path)
    assert [path.name for path in checkpoint.saved(tmp_path / "checkpoints")] == ["00000008"]
    assert not (tmp_path / "checkpoints/00000010.partial").exists()
    run(tmp_path)
    assert result(tmp_path) == result(undisturbed)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of 1 MiB. Returns its folder and a function that leaves a number of free bytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("only root may mount a file system")

    def leave(count):
        (folder / "ballast").unlink(missing_ok=True)
        found = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes(found.f_bavail * found.f_frsize - count))

    yield folder, leave
    subprocess.run(["umount", folder], check=True)


# TensorBoard writes in a background thread, which also prints the error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_small_disk(undisturbed, small_disk):
    folder, leave = small_disk
    leave(340_000)  # one checkpoint of 320 kB
    with pytest.raises(OSError, match=r"checkpoints/00000004: cannot be written: .*No space left on device"):
        run(folder / "out")
    assert [path.name for path in checkpoint.saved(folder / "out/checkpoints")] == ["00000002"]
    leave(0)
    with pytest.raises(OSError, match=r"No space left on device: '.*/out/settings.yaml'"):
        run(folder / "out")
    if find_spec("tensorboard"):
        with pytest.raises(OSError, match=r"No space left on device: '.*/board'"):
            Board(folder / "board", 0)
    (folder / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    with pytest.raises(OptionError, match=r"output '.*/out' cannot be written"):
        run(folder / "out")
    with pytest.raises(OptionError, match=r"output '.*/other' cannot be made: Read-only file system"):
        run(folder / "other")
    subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
    with open(undisturbed.parent / "told", "w") as file:
        run(folder / "out", Console(file=file, width=400), keep=["last"])
    assert "continues from step 2 of 10" in (undisturbed.parent / "told").read_text()
    assert result(folder / "out") == result(undisturbed)


def test_a_file_system_that_takes_no_large_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # less than a checkpoint
    try:
        with pytest.raises(OSError, match=r"checkpoints/00000002: cannot be written: .*File too large"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "checkpoints").iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a file on a full disk")
def test_a_table_that_cannot_grow_is_named():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        table = Table.__new__(Table)  # without __init__, which would replace the file
        table.path, table.rows = Path("/dev/full"), []
        table.add({"step": 1})


# `undisturbed` has imported every module, because another user may be unable to read the modules.
def test_a_folder_that_only_another_user_may_write_is_refused(undisturbed):
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:  # pytest's folders are closed to other users
        os.chmod(folder, 0o555)
        user = os.getuid()
        if user == 0:  # root may write to every folder
            os.setresuid(65534, 65534, 0)
        try:
            with pytest.raises(OptionError, match="cannot be written"):
                run(Path(folder))
            with pytest.raises(OptionError, match="cannot be made: Permission denied"):
                run(Path(folder) / "out")
        finally:
            if user == 0:
                os.setresuid(0, 0, 0)


def test_a_finished_training_without_its_evaluations_is_evaluated_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    (tmp_path / "out/evaluations.csv").unlink()
    run(tmp_path / "out")
    assert rows(tmp_path / "out/evaluations.csv") == rows(undisturbed / "evaluations.csv")[-1:]


def test_tensorboard_shows_every_step_once(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for first, steps in ((0, range(1, 5)), (2, range(3, 6))):  # the second run continues from step 2
        board = Board(tmp_path, first)
        for step in steps:
            board.add(step, {"loss": float(step)})
        board.close()
    accumulator = events.EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_the_memory_estimate_counts_sharding(tmp_path):
    settings = TrainSettings(**{**OPTIONS, "parallel": "fsdp", "output": tmp_path})
    data, model = open_data("digits"), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2**20, bias=False))

    def parameters(**changes):
        told = memory_estimate(model, replace(settings, **changes), data, 8, World(0, 8, torch.device("cpu")))
        return re.search(r"parameters (.*?), gradients (.*?),", told).groups()

    assert parameters() == ("32 MiB", "32 MiB")
    assert parameters(replicate=2) == ("64 MiB", "64 MiB")
    assert parameters(parallel="ddp") == ("256 MiB", "256 MiB")


def test_a_finished_training_is_not_run_again(undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "out")
    with open(tmp_path / "told", "w") as file:
        run(tmp_path / "out", Console(file=file, width=200))
    assert "continues from step 10 of 10" in (tmp_path / "told").read_text()
    assert result(tmp_path / "out") == result(undisturbed)


def test_another_training_in_the_folder_is_refused(undisturbed):
    before = result(undisturbed)
    with pytest.raises(
        OptionError, match=r"has a training with learning_rate 0\.001, now 0\.002; choose another output"
    ):
        run(undisturbed, learning_rate=0.002)
    assert result(undisturbed) == before


def test_only_settings_that_change_no_result_may_change(tmp_path):
    may_change = {"output", "data_root", "workers", "log_every", "keep", "device", "compile", "checkpointing"}
    may_change |= {"parallel", "replicate", "ep", "save_every", "evaluate_every", "bad_images", "max_skipped"}
    (tmp_path / "checkpoints/00000010").mkdir(parents=True)
    settings = TrainSettings(**{**OPTIONS, "output": tmp_path})
    refused = set()
    for name, value in settings.to_dict().items():
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump({**settings.to_dict(), name: [value, "other"]}))
        try:
            sys.modules[train.__module__]._check_and_write(settings, World(0, 1, torch.device("cpu")))
        except OptionError as error:
            assert f"has a training with {name} [" in str(error)
            refused.add(name)
    assert settings.to_dict().keys() - refused == may_change


def test_numbers_of_numpy_are_kept_as_numbers():
    settings = TrainSettings(learning_rate=np.float32(0.5), clip=np.float64(2.0))
    assert TrainSettings(**settings.to_dict()) == settings


@pytest.mark.parametrize(("name", "number", "old", "new"), [
    ("log.csv", 1, "loss", "l0ss"),
    ("log.csv", 2, "1,", "one,"),
    ("log.csv", 3, "2,", "2.5,"),
    ("log.csv", 2, ",", "\0"),
    ("log.csv", 2, ",", ",,"),
    ("evaluations.csv", 1, "top1", "top2"),
    ("evaluations.csv", 2, "0.", "\xff"),
])  # fmt: skip
def test_a_damaged_log_is_named(name, number, old, new, undisturbed, tmp_path):
    lines = (undisturbed / name).read_text().splitlines(keepends=True)
    lines[number - 1] = lines[number - 1].replace(old, new, 1)
    (tmp_path / name).write_text("".join(lines), encoding="latin-1")
    told = rf"{tmp_path / name}, line {number}: damaged; delete the file to continue without its rows"
    with pytest.raises(ValueError, match=re.escape(told)):
        Outputs(tmp_path, Console(quiet=True), 8, 10, True)
    (tmp_path / name).unlink()
    Outputs(tmp_path, Console(quiet=True), 8, 10, True).board.close()


def test_a_last_line_without_its_end_is_left_out(undisturbed, tmp_path):
    (tmp_path / "log.csv").write_bytes((undisturbed / "log.csv").read_bytes()[:-4])  # part of the last number
    assert [row["step"] for row in read_table(tmp_path / "log.csv")] == [str(step) for step in range(1, 10)]


def test_the_bar_shows_speed_losses_and_routing(tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    row = {"step": 6, "loss": 0.25, "images_per_second": 120.0, "load_cv": 0.5, "dropped": 0.125, "data_wait": 0.03}
    found = Evaluation(8, 0.875, 1.0, 0.3, 0.1, 50.0, [], {})
    with Outputs(tmp_path, console, 5, 10, True) as outputs:
        outputs.evaluated(5, 0.5, found)
        outputs.advance()
        outputs.log(row, {})
    told = console.file.getvalue()
    for words in ("6/10", "left", "loss 0.250", "120 images/s", "load cv 0.50", "dropped 12.5%", "accuracy 0.875"):
        assert words in told
    assert "data wait 3%" in told


def test_lines_without_a_terminal(tmp_path, monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=False, width=40)
    row = {"step": 6, "loss": 0.25, "images_per_second": 120.0, "load_cv": "", "dropped": "", "data_wait": 0.03}
    with Outputs(tmp_path, console, 5, 10, True) as outputs:
        outputs.advance()
        outputs.log(row, {})
        assert not console.file.getvalue()  # less than a minute has passed
        monkeypatch.setattr(sys.modules[Outputs.__module__], "SILENCE", 0.0)
        outputs.log(row, {})
    assert console.file.getvalue() == "step 6 of 10  loss 0.250  120 images/s  data wait 3%\n"


def test_two_trainings_in_a_folder_are_refused(undisturbed, monkeypatch):
    before = result(undisturbed)
    monkeypatch.setattr(sys.modules[train.__module__], "_LOCK_TIMEOUT", 0.0)
    with FileLock(undisturbed / ".lock"), pytest.raises(OptionError, match="another process trains in this folder"):
        run(undisturbed)
    assert result(undisturbed) == before


def test_kept_checkpoints(tmp_path):
    run(tmp_path / "every", keep=["every"], epochs=1, save_every=1)
    assert len(checkpoint.saved(tmp_path / "every/checkpoints")) == 5
    run(tmp_path / "best", keep=["best"], evaluate_every=3, save_every=10)  # the best step is no multiple of save_every
    names = {path.name for path in checkpoint.saved(tmp_path / "best/checkpoints")}
    evaluations = rows(tmp_path / "best/evaluations.csv")
    best = max(evaluations, key=lambda row: float(row["top1"]))
    assert f"{int(best['step']):08d}" in names and "00000010" in names


def test_float16_is_refused_for_sharded_models():
    settings = TrainSettings(**{**OPTIONS, "parallel": "fsdp", "precision": "float16"})
    with pytest.raises(OptionError, match="precision 'float16' needs loss scaling, which parallel 'fsdp' does not"):
        lay_out(torch.nn.Linear(1, 1), settings, World(0, 2, torch.device("cpu")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet_of_dreams"}, "model 'resnet_of_dreams' is no folder"),
        ({"model": ""}, "model must not be empty"),
        ({"router": "hash"}, "router 'hash' does not exist"),
        ({"group_size": 3}, "group_size 3 must divide 256, the number of images that run together"),
        ({"router": "no.such:factory"}, "cannot be imported"),
        ({"batch_size": 2000}, "1437 training images are less than one batch; wanted for example 512"),
        ({"batch_size": 255}, "255"),
        ({"batch_size": 10, "accumulate": 3}, "batch_size 10 must be a multiple of accumulate 3"),
        ({"epochs": "3"}, "epochs must be int, got '3'"),
        ({"keep": "best"}, r"keep must be list\[str\], got 'best'"),
        ({"model_args": 3}, r"model_args must be dict\[str, Any\], got 3"),
        ({"scale": 3}, r"scale must be tuple\[float, float\] \| None, got 3"),
        ({"compile": "no"}, "compile must be bool, got 'no'"),
        ({"warmup": 1e9}, "warmup must take at most all 10 steps of the training"),
        ({"shift": 100}, "shift must be at least 0 and less than the image's size, 8, got 100"),
        ({"workers": 1025}, "workers must be at most 1024, got 1025"),
        ({"head_bias": float("nan")}, "head_bias must be finite, got nan"),
        ({"ep": 2, "parallel": "fsdp"}, "ep 2 needs parallel 'fsdp' and several processes"),
        ({"ep": 2}, "ep 2 needs parallel 'fsdp', got 'ddp'"),
        ({"upcycle": "soft"}, "exclude each other"),
        (
            {"upcycle": "soft", "router": None, "model": "soft_moe_small_patch16_224"},
            "upcycle replaces MLPs of a dense ViT, but model 'soft_moe_small_patch16_224' has MoE layers",
        ),
        ({"pretrained": True}, "pretrained needs the name of a timm model"),
        ({"data": "nowhere"}, "no folder 'nowhere'"),
        ({"keep": ["some"]}, "keep must be a list of last, best, every"),
        ({"trained": "router", "router": "dense", "num_experts": None, "group_size": None}, "no such parameters"),
        ({"model_args": {**SMALL, "embed": 3}}, "embed"),
        ({"image_size": 10}, "img_size 10 is not a multiple of patch_size 4"),
        (
            {"model": "test_resnet", "model_args": {}, "router": None, "num_experts": None, "group_size": None},
            "model 'test_resnet' is not a vision transformer",
        ),
    ],
    ids=str,
)
def test_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", **changes)
    assert not checkpoint.saved(tmp_path / "out/checkpoints")


def test_a_dry_run_makes_the_optimizer(tmp_path):
    settings = TrainSettings(**{**OPTIONS, "output": tmp_path / "out", "optimizer_args": {"beta": 1}})
    with pytest.raises(OptionError, match="beta"):
        train(settings, dry_run=True, console=Console(quiet=True))


def test_dry_run(tmp_path):
    with open(tmp_path / "told", "w") as file:
        path = train(
            TrainSettings(**{**OPTIONS, "output": tmp_path / "out"}),
            dry_run=True,
            console=Console(file=file, width=200),
        )
    told = (tmp_path / "told").read_text()
    assert "memory: about" in told and "GFLOPs per image" in told and "2 epochs of 5 steps" in told
    assert path.read_bytes()[1:4] == b"PNG" and not (tmp_path / "out/checkpoints").exists()


def test_a_trained_folder_is_fine_tuned_on_other_classes(undisturbed, tmp_path):
    tmp_path.joinpath("idx").mkdir()
    folder = idx_folder(tmp_path / "idx")  # 5 x 4 pixels, 4 classes
    told = run(
        tmp_path / "out",
        model=str(undisturbed / "model"),
        model_args={},
        router=None,
        num_experts=None,
        data=str(folder),
        image_size=12,
        batch_size=6,
        epochs=1,
        trained="head",
    )
    model = from_pretrained(told)
    assert model(torch.zeros(2, 1, 12, 12)).shape == (2, 4)


def test_an_upcycled_timm_model(tmp_path):
    console = Console(file=io.StringIO(), width=400)
    folder = run(
        tmp_path,
        console,
        model="vit_tiny_patch16_224",
        model_args={"depth": 2, "embed_dim": 8, "num_heads": 2, "patch_size": 4},
        router=None,
        upcycle="softmax_expert_choice",
        epochs=1,
        layer_decay=0.5,
        ema=0.5,
    )
    told = "vit_tiny_patch16_224 with depth 2, embed_dim 8, num_heads 2, patch_size 4, image_size 8: "
    assert told in console.file.getvalue()
    model = from_pretrained(folder)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_a_checkpoint_of_the_reference_is_fine_tuned(tmp_path):
    tmp_path.joinpath("photos").mkdir()
    folder = run(
        tmp_path / "out",
        model=str(parity.GOLDEN / "ckpt" / "tiny"),
        model_args={},
        router=None,
        num_experts=None,
        data=str(picture_folder(tmp_path / "photos", count=4, test_count=4)),
        image_size=32,
        batch_size=4,
        epochs=1,
        trained="head",
    )
    trained = from_pretrained(folder)
    assert trained(torch.zeros(2, 3, 32, 32)).shape == (2, 2)
    given = load_model(str(parity.GOLDEN / "ckpt" / "tiny"), num_classes=2).state_dict()
    kept = {name for name, value in trained.state_dict().items() if torch.equal(value, given[name])}
    assert set(given) - kept == {"head.weight", "head.bias"}


def test_compiled_blocks_train_alike(undisturbed, tmp_path, monkeypatch):
    compiled = []

    def compile_block(block):  # the backend "eager" traces and runs the graph, and compiles no C++
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_block)
    run(tmp_path, compile=True)
    assert len(compiled) == SMALL["depth"]
    for found, wanted in zip(rows(tmp_path / "log.csv"), rows(undisturbed / "log.csv"), strict=True):
        assert float(found["loss"]) == pytest.approx(float(wanted["loss"]), abs=1e-5)


def made_router(dim, num_experts):
    return vr.create_router("softmax_token_choice", dim, num_experts)


@pytest.mark.parametrize(("changes", "words"), [
    ({"router": f"{__name__}:made_router"}, "JSON cannot represent router"),
    ({"model": "test_vit", "model_args": {"patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2},
      "router": None, "num_experts": None, "group_size": None}, "has no moe_config"),
])  # fmt: skip
def test_models_that_cannot_be_described_keep_their_parameters(changes, words, tmp_path):
    with open(tmp_path / "told.txt", "w") as file:
        folder = run(tmp_path / "out", Console(file=file, width=400), **{"batch_size": 1436, "epochs": 1, **changes})
    assert [path.name for path in folder.iterdir()] == ["model.safetensors"]
    assert "head.weight" in load_file(folder / "model.safetensors") and (tmp_path / "out/curve.png").is_file()
    told = (tmp_path / "told.txt").read_text()
    assert "has the parameters alone" in told and words in told and "vmoe-routers eval" not in told


def test_an_upcycled_model_with_drop_path_is_saved(tmp_path):
    arguments = {"depth": 2, "embed_dim": 8, "num_heads": 2, "patch_size": 4, "drop_path_rate": 0.2}
    folder = run(
        tmp_path,
        model="vit_tiny_patch16_224",
        model_args=arguments,
        router=None,
        upcycle="softmax_expert_choice",
        batch_size=1436,
        epochs=1,
    )
    assert from_pretrained(folder).blocks[1].drop_path1.drop_prob == pytest.approx(0.2)


def test_the_output_folder_is_not_the_model(undisturbed, tmp_path):
    with pytest.raises(OptionError, match=r"is the output folder of a training; its model is '.*out/model'"):
        evaluate(str(undisturbed), "digits", output=tmp_path)
    with pytest.raises(OptionError, match="image_size 10 is not a multiple of the patch size, 4 x 4"):
        evaluate(str(undisturbed / "model"), "digits", image_size=10, output=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=r"output '.*file' cannot be made: File exists"):
        evaluate(str(undisturbed / "model"), "digits", output=tmp_path / "file")


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no connection")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(OptionError, match="pretrained weights of 'test_vit' cannot be loaded: no connection"):
        run(tmp_path, model="test_vit", pretrained=True)
