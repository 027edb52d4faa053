"""The promises of docs/determinism.md: equal results in every run and with every number of threads."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_routers as vr
from vmoe_routers.models import vit_moe
from vmoe_routers.training import Optimisation, Trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),  # which also restores the number of threads
    pytest.mark.cpu_kernels,
]


class OnOneThread(TorchDispatchMode):
    """Runs an op of torch on one thread if its result depends on the number of threads."""

    OPS = (
        torch.ops.aten.native_layer_norm_backward,
        torch.ops.aten.mm,
        torch.ops.aten.addmm,
        torch.ops.aten.convolution_backward,
        torch.ops.aten.gelu,
        torch.ops.aten.gelu_backward,
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if func.overloadpacket in self.OPS else threads)
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch.set_num_threads(threads)


def train(router, threads, mode):
    """Returns loss and parameters of a step on 16 images of 16 patches."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = {} if router is None else {"num_experts": 4}
    if router not in (None, "soft"):
        options["group_size"] = 8
    model = vit_moe(8, 2, 1, 10, 32, 2, 2, 2.0, router=router, pos_embed_std=1.0, **options)
    torch.nn.init.normal_(model.head.weight)  # the head starts at 0, which passes no gradient on
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    step = Trainer(model.train(), Optimisation(), 10)
    with mode:
        loss = step(images, labels).loss
    return {"loss": loss} | {name: p.detach() for name, p in model.named_parameters()}


def check_equal(found, wanted):
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("router", [None, "softmax_token_choice", "sinkhorn_expert_choice", "soft"])
def test_from_run_to_run(router):
    check_equal(train(router, 2, contextlib.nullcontext()), train(router, 2, contextlib.nullcontext()))


@pytest.mark.parametrize("router", [None, *vr.ROUTERS])
def test_for_every_number_of_threads_but_for_ops_of_torch(router):
    wanted = train(router, 1, OnOneThread())
    for threads in (2, 3):
        check_equal(train(router, threads, OnOneThread()), wanted)


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_layers_for_every_number_of_threads(router):
    def run(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        grouping = {} if router == "soft" else {"group_size": 4}
        layer = vr.MoEMlp(64, 256, num_experts=8, router=router, **grouping)
        x = torch.randn(4, 49, 64, requires_grad=True)
        y = layer(x)
        with OnOneThread():  # the gradient of the router's weight
            (y * torch.randn_like(y)).sum().backward()
        return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}

    wanted = run(1)
    for threads in (2, 3):
        check_equal(run(threads), wanted)


def test_the_example_of_the_documentation_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "determinism.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["LayerNorm", "Linear", "patches"]
