"""State: a checkpoint of torch.distributed loads under every layout, bit for bit, and exports to the same file."""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import run
from small_models import apart, batch, loss_of, mine, vit, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from vmoe_routers.checkpoints import from_pretrained, save_pretrained
from vmoe_routers.distributed import Ema, Meshes, parallelize, whole_state_dict


class Training:
    """Returns model, optimizer and average in the form that `torch.distributed.checkpoint` takes."""

    def __init__(self, ep: int, seed: int, meta: bool = False):
        with torch.device("meta" if meta else "cpu"):
            self.model = vit("soft", seed=seed, num_experts=8)
        if dist.is_initialized():
            parallelize(self.model, Meshes.make("cpu", ep=ep))
        if meta:
            self.model.to_empty(device="cpu")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3, fused=True)
        self.ema = Ema(self.model, 0.5)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "ema": self.ema.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.ema.load_state_dict(state["ema"])

    def digest(self) -> str:
        tensors = {**dict(self.model.named_parameters()), **{f"ema {n}": t for n, t in self.ema.values.items()}}
        for name, parameter in self.model.named_parameters():
            tensors |= {f"{name} {key}": value for key, value in self.optimizer.state[parameter].items()}
        hashed = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            hashed.update(name.encode() + whole(tensor).contiguous().numpy().tobytes())
        return hashed.hexdigest()


def save(folder: Path) -> str:
    training = Training(ep=2, seed=0)
    for step in range(2):
        loss_of(training.model, *mine(*batch(8, seed=step))).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
        training.ema.update(training.model)
    dcp.save({"training": training}, checkpoint_id=folder)
    return training.digest()


def load(folder: Path, ep: int, export: Path) -> str:
    training = Training(ep, seed=9, meta=dist.is_initialized() and dist.get_world_size() == 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns if there is a single process
        dcp.load({"training": training}, checkpoint_id=folder)
    with training.ema.swapped(training.model):
        state = whole_state_dict(training.model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_pretrained(training.model, export / "ema", state_dict=state)
    state = whole_state_dict(training.model)
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_pretrained(training.model, export / "model", state_dict=state)
    else:
        assert state == {}
    return training.digest()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    digest = run(4, save, folder)[0]
    assert run(0, load, folder, 1, folder / "alone") == [digest]
    return folder, digest


@pytest.mark.parametrize("world, ep", [(4, 4), (2, 1), (3, 1)])
def test_loads_elsewhere_and_exports_the_same_file(saved, tmp_path, world, ep):
    folder, digest = saved
    assert run(world, load, folder, ep, tmp_path) == [digest] * world
    for name in ("model", "ema"):
        files = [(place / name / "model.safetensors").read_bytes() for place in (tmp_path, folder / "alone")]
        assert files[0] == files[1]
        from_pretrained(tmp_path / name)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() != files[0]


def logged() -> list[str]:
    """Returns the messages that torch logs while it gathers experts over two axes of a mesh."""
    logger, messages = logging.getLogger("torch.distributed.tensor._redistribute"), []
    logger.setLevel(logging.WARNING)
    logger.addFilter(lambda record: messages.append(record.getMessage()))
    whole_state_dict(parallelize(vit("soft"), Meshes.make("cpu", ep=2)))
    assert logger.level == logging.WARNING
    return messages


def test_gathering_is_silent():
    assert run(2, logged) == [[], []]


def averages() -> list[float]:
    """The averages of sharded training and of DDP, against the formula in one process."""
    wanted = vit("softmax_token_choice")
    plain = DistributedDataParallel(vit("softmax_token_choice"))
    sharded = parallelize(vit("softmax_token_choice"), Meshes.make("cpu", ep=2))
    values = {name: value.clone() for name, value in wanted.state_dict().items()}
    emas = [(plain, Ema(plain.module, 0.9), plain.module), (sharded, Ema(sharded, 0.9), sharded)]
    found = []
    for step in range(2):
        for model, ema, inner in [*emas, (wanted, None, wanted)]:
            x = batch(8, seed=step) if ema is None else mine(*batch(8, seed=step))
            loss_of(model, *x).backward()
            torch.optim.SGD(model.parameters(), 0.1).step()
            model.zero_grad()
            if ema is not None:
                ema.update(inner)
        values = {name: 0.9 * values[name] + 0.1 * value for name, value in wanted.state_dict().items()}
    logits = wanted.eval()(batch(8)[0])
    for model, ema, inner in emas:
        before = {name: whole(value) for name, value in inner.state_dict().items()}
        found.append(apart({name: whole(value) for name, value in ema.values.items()}, values))
        model.eval()
        with torch.no_grad():
            model(mine(batch(8)[0])[0])  # after this call, the parameters of the root are still gathered
            with ema.swapped(inner):
                averaged = model(mine(batch(8)[0])[0])
            found.append(apart({"logits": model(mine(batch(8)[0])[0])}, {"logits": mine(logits)[0]}))
        wanted.load_state_dict(values)
        found.append(apart({"averaged": averaged}, {"averaged": mine(wanted(batch(8)[0]))[0].detach()}))
        found.append(apart({name: whole(value) for name, value in inner.state_dict().items()}, before))
    return found


def test_average_of_ddp_and_sharded_models():
    found = run(2, averages)[0]
    assert len(found) == 8
    assert max(found) < 1e-10


def test_average_in_one_process():
    model = nn.BatchNorm1d(3)
    model.weight.requires_grad_(False)
    ema = Ema(model, 0.75)
    nn.init.constant_(model.weight, 5.0)
    model.num_batches_tracked += 2
    ema.update(model)
    assert ema.values["weight"].tolist() == [2.0] * 3
    assert ema.values["num_batches_tracked"] == 2
    with pytest.raises(RuntimeError, match="within"), ema.swapped(model):
        assert model.weight.tolist() == [2.0] * 3
        raise RuntimeError("within")
    assert model.weight.tolist() == [5.0] * 3
    assert whole_state_dict(model).keys() == ema.state_dict().keys()


def test_average_of_tied_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema = Ema(model, 0.0)
    start = model[0].weight.detach().clone()
    nn.init.zeros_(model[0].weight)
    with ema.swapped(model):
        assert torch.equal(model[1].weight, start)
    assert not model[1].weight.any()


def test_whole_state_is_a_copy():
    model = nn.BatchNorm1d(2)
    state = whole_state_dict(model)
    model.weight.data.zero_()
    model.running_mean += 1
    assert state["weight"].tolist() == [1.0, 1.0] and state["running_mean"].tolist() == [0.0, 0.0]


def test_average_refused():
    with pytest.raises(ValueError, match=r"Ema: decay must be in \[0, 1\], got 1.5"):
        Ema(nn.Linear(2, 2), 1.5)
    with pytest.raises(ValueError, match="they differ in bias"):
        Ema(nn.Linear(2, 2), 0.5).load_state_dict({"weight": torch.zeros(2, 2)})
