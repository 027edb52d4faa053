"""parallelize: every layout of the ranks equals one process over the whole batch."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from small_models import ROUTERS, apart, batch, gradients, loss_of, mine, vit, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from vmoe_routers.distributed import Meshes, clip_grad_norm_, parallelize

IMAGES = 16


def trained(model: nn.Module, part: Callable[..., Any], clip: Callable[..., Tensor]) -> list[dict[str, Tensor]]:
    """Trains three steps; gives losses and norms, the first gradients, and the values afterwards."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    numbers, first = {}, {}
    for step in range(3):
        loss = loss_of(model, *part(*batch(IMAGES, seed=step)))
        loss.backward()
        first = first or gradients(model)
        numbers[f"loss {step}"], numbers[f"norm {step}"] = loss.detach(), clip(model.parameters(), 0.5)
        if part is mine:
            dist.all_reduce(numbers[f"loss {step}"])
            numbers[f"loss {step}"] /= dist.get_world_size()
        optimizer.step()
        optimizer.zero_grad()
    return [numbers, first, {name: whole(value) for name, value in model.state_dict().items()}]


def layouts_apart(router: str, layouts: list[tuple[int, int]]) -> list[list[float]]:
    wanted = trained(vit(router), lambda *tensors: tensors, nn.utils.clip_grad_norm_)
    found = []
    for replicate, ep in layouts:
        model = parallelize(vit(router), Meshes.make("cpu", replicate=replicate, ep=ep), reshard_after_forward=ep < 4)
        found.append([apart(*pair) for pair in zip(trained(model, mine, clip_grad_norm_), wanted)])
    return found


@pytest.mark.parametrize("router", ROUTERS)
def test_every_layout_equals_one_process(router):
    layouts = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2)] if router == "softmax_token_choice" else [(1, 2)]
    for numbers, grads, values in run(4, layouts_apart, router, layouts)[0]:
        assert numbers < 1e-10
        assert grads < 1e-10
        assert values < 1e-6  # the gradient of the keys' biases is rounding error, which AdamW divides by its size


def unpatched_apart() -> dict[str, float]:
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # the routers' gates
    mesh = init_device_mesh("cpu", (2,))
    found = {}
    for router in ROUTERS:
        model = vit(router)
        loss_of(model, *batch(8)).backward()
        wanted = gradients(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        sharded = vit(router)
        fully_shard(sharded.blocks[1].mlp.router, mesh=mesh)  # a separate FSDP unit
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for name, other in (("DDP", DistributedDataParallel(vit(router))), ("FSDP2", sharded)):
            loss_of(other, *mine(*batch(8))).backward()
            found[f"{router} {name}"] = apart(gradients(getattr(other, "module", other)), wanted)
            found[f"{router} {name} norm"] = abs(float(clip_grad_norm_(other.parameters(), 0.5) / norm - 1))
            found[f"{router} {name} clipped"] = apart(gradients(getattr(other, "module", other)), gradients(model))
    return found


def test_ddp_and_fsdp2_of_torch_alone():
    found = run(2, unpatched_apart)[0]
    assert len(found) == 36
    assert {name: value for name, value in found.items() if value > 1e-10} == {}


def variants() -> dict[str, float]:
    meshes = Meshes.make("cpu", ep=2)
    model = vit("softmax_token_choice")
    loss_of(model, *batch(8)).backward()
    wanted = gradients(model)
    found = {}
    for norm_type in (1.0, 3.0, math.inf):
        other = copy.deepcopy(model)
        for p, q in zip(other.parameters(), model.parameters()):
            p.grad = q.grad.clone()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5, norm_type)
        sharded = parallelize(vit("softmax_token_choice"), meshes)
        loss_of(sharded, *mine(*batch(8))).backward()
        found[f"norm {norm_type}"] = abs(float(clip_grad_norm_(sharded.parameters(), 0.5, norm_type) / norm - 1))
        found[f"clipped {norm_type}"] = apart(gradients(sharded), gradients(other))
    sharded = parallelize(vit("softmax_token_choice"), meshes)
    images, labels = mine(*batch(8))
    for micro in (0, 1):
        sharded.set_requires_gradient_sync(micro == 1)
        (loss_of(sharded, images[2 * micro :][:2], labels[2 * micro :][:2]) / 2).backward()
    found["two micro-batches"] = apart(gradients(sharded), wanted)
    return found


def test_norms_and_accumulation_under_expert_parallelism():
    assert {name: value for name, value in run(2, variants)[0].items() if value > 1e-10} == {}


def features_apart() -> float:
    model, wanted = (vit("softmax_token_choice").eval() for _ in range(2))
    parallelize(model, Meshes.make("cpu", ep=2))
    register_fsdp_forward_method(model, "forward_features")
    images = mine(batch(8)[0])[0]
    with torch.no_grad():
        return max(
            apart({"x": f(images)}, {"x": g(images)})
            for f, g in [(model.forward_features, wanted.forward_features), (model, wanted)]
        )


def test_features_without_the_head():
    assert max(run(2, features_apart)) < 1e-10


def low_precision() -> tuple[Any, ...]:
    model = parallelize(vit("softmax_token_choice").float(), Meshes.make("cpu", ep=2), param_dtype=torch.bfloat16)
    images, labels = mine(*batch(8))
    loss_of(model, images.float(), labels).backward()
    grads, values = (
        {tensor.dtype for tensor in tensors} for tensors in (gradients(model).values(), model.parameters())
    )
    output = model.eval()(images.float()).detach()
    wanted = vit("softmax_token_choice").eval()(batch(8)[0]).detach()
    error = apart({"logits": output.double()}, {"logits": mine(wanted)[0]})
    return output.dtype, grads, values, error


def test_bfloat16_with_gradients_in_float32():
    output, grads, values, error = run(2, low_precision)[0]
    assert (output, grads, values) == (torch.bfloat16, {torch.float32}, {torch.float32})
    assert 0 < error < 0.1
