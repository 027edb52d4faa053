"""train on several processes: the same losses and the same exported model as on one, and one's checkpoints."""

import csv
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from vmoe_routers.training import TrainSettings, checkpoint, train
from vmoe_routers.training.settings import SETTINGS

pytestmark = pytest.mark.usefixtures("one_thread")

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


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("alone")
    train(TrainSettings(**{**OPTIONS, "output": output}), console=Console(quiet=True))
    return output


def run_on_two(alone, output, *flags):
    output.mkdir(exist_ok=True)
    config = output.parent / f"{output.name}.yaml"
    values = yaml.safe_load((alone / SETTINGS).read_text())
    config.write_text(yaml.safe_dump({**values, "output": str(output)}))
    return torchrun("-m", "vmoe_routers", "train", "--config", str(config), *flags)


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr
    return found.stdout


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


def test_two_sharded_processes_train_as_one(alone, tmp_path):
    told = run_on_two(alone, tmp_path / "two", "--parallel=fsdp", "--ep=2")
    assert told.count("2 processes on cpu") == 1  # one process writes
    check_same(tmp_path / "two", alone)


def test_sharded_processes_continue_a_checkpoint_of_one(alone, tmp_path):
    output = tmp_path / "two"
    shutil.copytree(alone, output)
    last = checkpoint.saved(output / "checkpoints")[-1]
    assert last.name == "00000005"
    shutil.rmtree(last)
    told = run_on_two(alone, output, "--parallel=fsdp", "--ep=2")
    assert "continues from step 3 of 5" in told
    check_same(output, alone)
    # And one process reads what two wrote.
    train(TrainSettings(**{**OPTIONS, "output": output}), console=Console(quiet=True))
    check_same(output, alone)


KILLED_ONCE = """
import os, signal, sys, yaml
from vmoe_routers.training import Trainer, TrainSettings, train

call = Trainer.__call__

def killed(self, images, targets):
    if (self.step, self.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == (4, 1, "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    return call(self, images, targets)

Trainer.__call__ = killed
train(TrainSettings(**yaml.safe_load(sys.argv[1])))
"""


def test_two_processes_of_ddp_of_which_one_is_killed_train_as_one(alone, tmp_path):
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    options = {**OPTIONS, "output": str(tmp_path / "two"), "device": "cpu"}
    told = torchrun("--max-restarts", "1", str(script), yaml.safe_dump(options))
    assert "continues from step 3 of 5" in told
    check_same(tmp_path / "two", alone)
