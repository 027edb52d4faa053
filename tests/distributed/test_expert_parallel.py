"""ExpertParallel: a layer whose experts are on several ranks equals the layer in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run
from small_models import ROUTERS, apart, mine, same_noise, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import vmoe_routers as vr
from vmoe_routers.distributed import ExpertParallel


def layer(dtype: torch.dtype, **options: Any) -> vr.MoEMlp:
    torch.manual_seed(3)
    made = vr.MoEMlp(24, 48, **{"num_experts": 8, "group_size": 2, "dtype": dtype, **options})
    for parameter in made.experts.parameters():  # because the biases start at 0
        nn.init.normal_(parameter, std=0.5)
    same_noise(made)
    return made


def distributed(made: vr.MoEMlp) -> vr.MoEMlp:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("ep",))
    parallelize_module(made, mesh, {"experts": ExpertParallel()})
    return made


def results(made: vr.MoEMlp, x: Tensor, mask: Tensor | None, weight: Tensor) -> dict[str, Tensor]:
    """Returns output and gradients. The loss is a mean over the images."""
    x = x.clone().requires_grad_()
    y = made(x, mask)
    ((y * weight).mean() + vr.aux_loss(made)).backward()
    assert type(y) is Tensor
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n: whole(p.grad) for n, p in made.named_parameters() if p.grad is not None},
    }


def layer_apart(dtype: torch.dtype, masked: bool, images: int, **options: Any) -> float:
    world = dist.get_world_size()
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(world * images, 13, 24, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(world * images, 13, generator=generator) > 0.3 if masked else None
    weight = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)
    wanted = results(layer(dtype, **options), x, mask, weight)
    wanted.update(y=mine(wanted["y"])[0], x=mine(wanted["x"])[0] * world)
    part = mine(x)[0], None if mask is None else mine(mask)[0], mine(weight)[0]
    found = results(distributed(layer(dtype, **options)), *part)
    for name, tensor in found.items():
        if name not in ("x", "y"):
            if not name.startswith("experts"):
                dist.all_reduce(tensor)
            tensor /= world
    worst = torch.tensor(apart(found, wanted))
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def layers_apart() -> dict[str, float]:
    found = {}
    for router, options in ROUTERS.items():
        for masked in (False, True):
            found[f"{router} {masked}"] = layer_apart(torch.float64, masked, 4, router=router, **options)
        found[f"{router} float32"] = layer_apart(torch.float32, False, 2, router=router, **options) * 1e-12 / 2e-5
    gated = {"glu": True, "act_layer": nn.SiLU, "norm_layer": nn.LayerNorm}
    one = {"router": "softmax_token_choice", "group_size": 1, "num_experts": dist.get_world_size(), "top_k": 2}
    found["gated, with a norm"] = layer_apart(torch.float64, False, 2, router="soft", **gated)
    found["first bias alone"] = layer_apart(torch.float64, False, 2, router="soft", bias=(True, False))
    found["one expert and one group per rank"] = layer_apart(torch.float64, False, 1, **one)
    return found


def test_layer_equals_one_process():
    found = run(4, layers_apart)[0]
    assert len(found) == 21
    assert {name: value for name, value in found.items() if value > 1e-12} == {}


def in_eval() -> float:
    """With three images per rank in groups of two, a forward calls the experts twice."""
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(dist.get_rank()), dtype=torch.float64)
    options = {"router": "softmax_token_choice", "top_k": 1}
    with torch.no_grad():
        wanted = layer(torch.float64, **options).eval()(x)
        found = distributed(layer(torch.float64, **options).eval())(x)
    return float((found - wanted).abs().max())


def test_eval_with_a_smaller_last_group():
    assert max(run(2, in_eval)) < 1e-12


REFUSED = {
    "experts": "ValueError: ExpertParallel: the number of experts must be a multiple of the ep=2 ranks",
    "own experts": "TypeError: ExpertParallel: experts must be a vmoe_routers.Experts, got ExpertList",
    "batch": "ValueError: MoEMlp: a batch of 3 images is not a multiple of group_size=2",
    "within DDP": "RuntimeError: ExpertParallel: the layer is within DistributedDataParallel",
    "around DDP": "RuntimeError: ",  # raised by torch
}


def messages() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ep",))
    found = {}
    for case in REFUSED:
        made = layer(torch.float64, num_experts=3 if case == "experts" else 8)
        if case == "own experts":
            made = vr.MoEMlp(24, num_experts=2, experts=[nn.Linear(24, 24) for _ in range(2)])
        wrapped = DistributedDataParallel(made) if case == "within DDP" else made
        with pytest.raises(Exception) as caught:
            parallelize_module(made, mesh, {"experts": ExpertParallel()})
            if case == "around DDP":
                wrapped = DistributedDataParallel(made)
            wrapped(torch.randn(3 if case == "batch" else 2, 5, 24, dtype=torch.float64))
        found[case] = f"{caught.type.__name__}: {caught.value}"
    return found


def test_refused():
    for found in run(2, messages):
        assert {case: found[case][: len(start)] for case, start in REFUSED.items()} == REFUSED
