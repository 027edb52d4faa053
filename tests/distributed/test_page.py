"""docs/distributed.md and the distributed example run on two ranks. A script computes the numbers of the page."""

from __future__ import annotations

import os
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run
from small_models import apart, batch, gradients, loss_of, mine, vit

from vmoe_routers.checkpoints import from_pretrained

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "distributed.md"
EXAMPLE = ROOT / "examples" / "train_distributed.py"


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return found


def script(code: str, folder: Path, port: int) -> dict[str, object]:
    """Runs a training script as torchrun does, and gives its plain variables."""
    environment = {
        "RANK": dist.get_rank(),
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    dist.destroy_process_group()
    os.chdir(folder)
    variables: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, "script", "exec"), variables)
    dist.init_process_group(store=dist.FileStore(str(folder / "store"), 2), rank=environment["RANK"], world_size=2)
    return {name: value for name, value in variables.items() if isinstance(value, float)}


@pytest.fixture
def port() -> Iterator[int]:
    """Gives the port of an open store, as torchrun's agent does. Another process could take a free port."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def test_example_trains_on_two_ranks(tmp_path, port):
    pytest.importorskip("sklearn")
    first, second = run(2, script, EXAMPLE.read_text(), tmp_path, port)
    assert first["accuracy"] == second["accuracy"] > 0.2


def test_training_script_runs(tmp_path, port):
    run(2, script, block("py"), tmp_path, port)
    assert from_pretrained(tmp_path / "trained")(torch.randn(1, 3, 16, 16)).shape == (1, 10)


def timm_task() -> float:
    names: dict = {}
    exec(compile(block("python"), PAGE.name, "exec"), names)
    alone = vit("softmax_token_choice")
    loss_of(alone, *batch(8)).backward()
    task = names["MoEClassificationTask"](vit("softmax_token_choice"), F.cross_entropy, verbose=False)
    task.prepare_distributed()
    task(*mine(*batch(8)))["loss"].backward()
    return apart(gradients(task.trainable_module.module), gradients(alone))


def test_task_of_timm_adds_the_auxiliary_loss():
    assert run(2, timm_task)[0] < 1e-10


def test_numbers_and_plot_come_from_the_script(tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import image

    costs = runpy.run_path(str(ROOT / "scripts" / "expert_parallel_cost.py"))
    assert f"{costs['MARKS'][0]}\n{costs['tables']()}\n{costs['MARKS'][1]}" in PAGE.read_text()
    costs["draw"](tmp_path / "costs.png")
    drawn, kept = (image.imread(path) for path in (tmp_path / "costs.png", PAGE.with_name("expert_parallel_cost.png")))
    assert drawn.shape == kept.shape


def test_costs_have_their_limits():
    costs = runpy.run_path(str(ROOT / "scripts" / "expert_parallel_cost.py"))
    assert costs["exchange"](128, 1) == costs["sharding"](8, 8) == 0
    assert costs["exchange"](128, 8) / costs["experts"](128) == pytest.approx(0.193 * 7 / 8, rel=0.01)
    assert costs["exchange"](128, 32) / costs["experts"](128) == pytest.approx(1.736 * 24 / 32, rel=0.01)
    assert costs["sharding"](1024, 32) < costs["sharding"](1024, 1)
