"""Training on several processes: losses and model equal a run in one process, whose checkpoints can be continued."""

import csv
import errno
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.distributed import ranks
from tests.training.made import TEST, TEST_LABELS, TRAIN, TRAIN_LABELS, idx, idx_folder
from vmoe_routers import cli
from vmoe_routers.training import Trainer, TrainSettings, checkpoint, evaluate, train

try:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
except ImportError:
    ShardPlacementResult = None

pytestmark = pytest.mark.usefixtures("one_thread")
sharded = pytest.mark.skipif(ShardPlacementResult is None, reason="expert parallelism with FSDP2 needs torch 2.12")

OPTIONS = {
    "model_args": {"patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "noise_std": 0.0},
    "router": "softmax_token_choice",
    "num_experts": 4,
    "group_size": 2,
    "scale": None,
    "hflip": 0.0,
    "shift": 1,
    "batch_size": 256,
    "epochs": 1,  # 5 steps
    "accumulate": 2,
    "ema": 0.5,
    "mixup": 0.2,
    "mix_prob": 0.0,
    "learning_rate": 0.01,
    "optimizer": "sgd",
    "save_every": 3,
    "log_every": 1,
    "keep": ["every"],
    "workers": 0,
}
SHARDED = {"parallel": "fsdp", "ep": 2}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("alone")
    train(TrainSettings(**{**OPTIONS, "output": output}), console=Console(quiet=True))
    torch.set_num_threads(threads)
    return output


def train_here(output, **changes):
    """Trains on this rank. Each rank has a file as its console."""
    output.mkdir(exist_ok=True)
    rank = torch.distributed.get_rank()
    with open(output / f"told_by_{rank}.txt", "w") as file:
        train(TrainSettings(**{**OPTIONS, **changes, "output": output}), console=Console(file=file, width=200))


def told(output):
    """Returns the printed text. Only the first rank prints."""
    assert (output / "told_by_1.txt").read_text() == ""
    return (output / "told_by_0.txt").read_text()


def check_same(output, alone):
    for name in ("log.csv", "evaluations.csv"):
        with open(output / name) as ours, open(alone / name) as theirs:
            for row, wanted in zip(csv.DictReader(ours), csv.DictReader(theirs), strict=True):
                for key in ("step", "loss", "aux_loss", "grad_norm", "load_cv", "dropped", "top1", "skipped_steps"):
                    if key in wanted:
                        assert float(row[key]) == pytest.approx(float(wanted[key]), rel=2e-4, abs=1e-6), (name, key)
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (output, alone))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-5), name


@sharded
def test_two_sharded_processes_train_as_one(alone, tmp_path):
    ranks.run(2, train_two_sharded, tmp_path / "two")
    assert told(tmp_path / "two").count("2 processes on cpu") == 1
    check_same(tmp_path / "two", alone)


def train_two_sharded(output):
    train_here(output, **SHARDED)


@sharded
def test_sharded_processes_continue_a_checkpoint_of_one(alone, tmp_path):
    output = tmp_path / "two"
    shutil.copytree(alone, output)
    last = checkpoint.saved(output / "checkpoints")[-1]
    assert last.name == "00000005"
    shutil.rmtree(last)
    ranks.run(2, train_two_sharded, output)
    assert "continues from step 3 of 5" in told(output)
    check_same(output, alone)
    # One process reads a checkpoint of two processes, too.
    train(TrainSettings(**{**OPTIONS, "output": output}), console=Console(quiet=True))
    check_same(output, alone)


def test_fewer_images_than_processes_are_evaluated(alone, tmp_path):
    """Two ranks see one or three images; padding does not count."""
    for images in (1, 3):
        folder = tmp_path / str(images)
        folder.mkdir()
        pixels, labels = idx(torch.arange(64 * images).view(images, 8, 8)), idx([9] * images)
        data = idx_folder(folder, **{TRAIN: pixels, TRAIN_LABELS: labels, TEST: pixels, TEST_LABELS: labels})
        options = {"model": str(alone / "model"), "data": str(data), "model_args": {"group_size": 1}, "device": "cpu"}
        wanted = evaluate(**options, output=tmp_path, workers=0, console=Console(quiet=True))
        for found in ranks.run(2, evaluate_here, options, tmp_path):
            assert found.images == images and (found.top1, found.loss) == pytest.approx((wanted.top1, wanted.loss))


def evaluate_here(options, output):
    return evaluate(**options, output=output, workers=0, console=Console(quiet=True))


# Rank 1 is killed once, in the first training. After the restart a second training runs until it is interrupted.
SCRIPT = """
import json, os, signal, sys
from vmoe_routers import cli
from vmoe_routers.training import Trainer

call, first, second = Trainer.__call__, *sys.argv[1:]

def killed(self, images, targets):
    if (self.step, self.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (4, 1, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, images, targets)

Trainer.__call__ = killed
assert cli.main(["train", "--config", first]) == 0
status = cli.main(["train", "--config", second])
print(f"rank {os.environ['RANK']} ended with {status}", flush=True)
sys.exit(status)
"""


def test_torchrun_restarts_a_killed_process_and_passes_on_sigterm(alone, tmp_path):
    script, configs = tmp_path / "script.py", [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    script.write_text(SCRIPT)
    long = {"epochs": 100_000, "log_every": 1_000_000, "workers": 1, "save_every": 1_000_000}
    for config, changes in zip(configs, ({}, long), strict=True):
        settings = TrainSettings(**{**OPTIONS, **changes, "device": "cpu", "output": tmp_path / config.stem})
        config.write_text(yaml.safe_dump(settings.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [*command, "--max-restarts", "1", "--monitor-interval", "0.1", str(script), *map(str, configs)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 300
    while not (tmp_path / "second/evaluations.csv").exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)  # in the middle of a step
    process.terminate()
    out, err = process.communicate(timeout=300)
    assert "continues from step 3 of 5" in out, err
    check_same(tmp_path / "first", alone)
    # The ranks agree on an interruption at every step, also at a step without a row of the log.
    (saved,) = checkpoint.saved(tmp_path / "second/checkpoints")
    assert re.findall(r"interrupted; saved at step (\d+)", out) == [str(int(saved.name))], err
    assert [f"rank {rank} ended with 130" in out for rank in (0, 1)] == [True, True]


def test_an_error_goes_to_the_file_that_torchrun_prints(tmp_path, monkeypatch, capsys):
    """torchrun prints the error of the first rank that failed, once, at the end."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    monkeypatch.setenv("RANK", "3")
    before = int(time.time())
    assert cli.main(["train", "--epochs", "0"]) == 2
    assert capsys.readouterr() == ("", "")
    failure = ProcessFailure(0, 1, 2, str(file))
    assert failure.timestamp >= before
    assert failure.message["message"] == (
        "vmoe-routers: rank 3: --epochs must be at least 1 and at most 2147483647, got 0"
    )

    def fault(settings, options):
        raise KeyError("a\nfault")

    monkeypatch.setitem(cli.COMMANDS, "train", cli.COMMANDS["train"]._replace(run=fault))
    with pytest.raises(KeyError):  # Python prints the traceback
        cli.main(["train"])
    assert ProcessFailure(0, 1, 2, str(file)).message["message"] == r"vmoe-routers: rank 3: KeyError: 'a\nfault'"


def test_the_rank_with_an_error_is_named(tmp_path):
    """The rank without an error says that it has lost the other rank, without a traceback."""
    settings = TrainSettings(**{**OPTIONS, "device": "cpu", "output": tmp_path / "out"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    with pytest.raises(AssertionError, match="the process died"):  # both processes end as torchrun's do
        ranks.run(2, fail_on_rank_1, tmp_path)
    expected = r"vmoe-routers: rank 0: lost another rank, whose error is the cause: .*gloo.*"
    expected = [expected, r"vmoe-routers: rank 1: \[Errno 28\] No space left on device: '/data'"]
    for rank, words in enumerate(expected):
        told = (tmp_path / f"stderr_{rank}.txt").read_text()
        assert re.fullmatch(words, told.splitlines()[-1]) and "Traceback" not in told
        assert re.fullmatch(words, ProcessFailure(0, 1, 2, str(tmp_path / f"error_{rank}.json")).message["message"])


def fail_on_rank_1(folder):
    rank = torch.distributed.get_rank()
    os.environ |= {"TORCHELASTIC_ERROR_FILE": str(folder / f"error_{rank}.json"), "RANK": str(rank)}
    cli._PATIENCE = 0
    if rank == 1:
        Trainer.__call__ = lambda *arguments: out_of_space()
    with open(folder / f"stderr_{rank}.txt", "w") as file, redirect_stderr(file):
        status = cli.main(["train", "--config", str(folder / "config.yaml")])
    os._exit(status)


def out_of_space():
    raise OSError(errno.ENOSPC, "No space left on device", "/data")
