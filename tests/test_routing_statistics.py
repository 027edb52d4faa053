"""RoutingStatistics: the metrics of MoE layers over batches, against the dense tensors of every group."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import vmoe_routers as vr
from vmoe_routers.inspect import RoutingStatistics
from vmoe_routers.models import vit_moe
from vmoe_routers.routers.metrics import metrics

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "softmax_token_choice": {"top_k": 2, "capacity_factor": 0.3},
    "softmax_expert_choice": {"capacity_factor": 0.3},
    "soft": {},
}


def tiny(router, group_size=4):
    torch.manual_seed(0)
    if router is not None and router != "soft":
        options = {"num_experts": 4, "group_size": group_size, **OPTIONS[router]}
    else:
        options = {} if router is None else {"num_experts": 4}
    model = vit_moe(8, 2, 1, 3, embed_dim=16, depth=2, num_heads=2, router=router, **options).eval()
    if router is not None:
        nn.init.normal_(next(model.blocks[1].mlp.router.parameters()))
    return model


def statistics_of(model, images, batch, valid=None):
    valid = torch.ones(len(images), dtype=torch.bool) if valid is None else valid
    statistics = RoutingStatistics(model, "cpu")
    for part, counts in zip(images.split(batch), valid.split(batch)):
        with torch.no_grad(), statistics.recording(counts):
            model(part)
    return statistics


@pytest.mark.parametrize("batch", [4, 8, 16])
@pytest.mark.parametrize("router", OPTIONS)
def test_by_brute_force(router, batch):
    """Records ten images in groups of four. The last group has two images."""
    model, images = tiny(router), torch.rand(10, 1, 8, 8)
    layer, inputs = model.blocks[1].mlp, []
    hook = layer.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    (found,) = statistics_of(model, images, batch).layers().values()
    hook.remove()

    load, entropy, untouched, filled, slots = torch.zeros(4).double(), [], [], 0, 0
    asked = given = 0
    for group in torch.cat(inputs).split(layer.group_size):
        with torch.no_grad():
            routing = layer.router(group.flatten(0, 1).unsqueeze(0))
        dispatch, combine = routing.dispatch_tensor()[0].double(), routing.combine_tensor()[0].double()  # [T, E, C]
        if router == "soft":
            gates = combine.sum(2)
            load += gates.sum(0)
        else:
            gates = routing.weights[0].double()
            load += dispatch.sum((0, 2))
            untouched.append((dispatch.sum((1, 2)) == 0).double())
            filled += dispatch.sum()
            slots += dispatch.shape[1] * dispatch.shape[2]
        if router == "softmax_token_choice":
            asked, given = asked + routing.expert.numel(), given + int(dispatch.sum())
        gates = gates / gates.sum(1, keepdim=True)
        entropy.append(-(gates * gates.log()).sum(1))
    load /= 10

    assert found["load"] == pytest.approx(load.tolist(), rel=1e-5)
    assert found["load_cv"] == pytest.approx(float(load.std(correction=0) / load.mean()), rel=1e-4)
    assert found["dead_experts"] == int((load == 0).sum())
    assert found["entropy"] == pytest.approx(float(torch.cat(entropy).mean()), rel=1e-5)
    assert ("dropped_requests" in found) == (router == "softmax_token_choice")
    if router == "soft":
        assert found["dropped"] == 0 and found["utilisation"] == 1
        assert sum(found["load"]) == pytest.approx(16)
    else:
        assert found["dropped"] == pytest.approx(float(torch.cat(untouched).mean()), rel=1e-5) and found["dropped"] > 0
        assert found["utilisation"] == pytest.approx(float(filled / slots), rel=1e-5)
    if asked:
        assert found["dropped_requests"] == pytest.approx(1 - given / asked) and found["dropped_requests"] > 0


@pytest.mark.parametrize("router", OPTIONS)
def test_one_batch_is_the_metrics_of_its_routing(router):
    model, images = tiny(router), torch.rand(8, 1, 8, 8)
    with torch.no_grad(), vr.inspect.record(model) as trace:
        model(images)
    (routing,) = trace.routings["blocks.1.mlp"]
    wanted = metrics(routing)
    found = statistics_of(model, images, 8).layers()["blocks.1.mlp"]
    assert found.keys() == wanted.keys()
    assert found.pop("load") == pytest.approx((wanted.pop("load").sum(0) / 8).tolist())
    assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, rel=1e-5)


@pytest.mark.parametrize("router", OPTIONS)
def test_padding_does_not_count(router):
    """With groups of one image, padding images form separate groups."""
    model, images = tiny(router, group_size=1), torch.rand(5, 1, 8, 8)
    padded, valid = torch.cat([images, torch.randn(3, 1, 8, 8) * 9]), torch.tensor([True] * 5 + [False] * 3)
    (wanted,) = statistics_of(model, images, 4).layers().values()
    (found,) = statistics_of(model, padded, 4, valid).layers().values()
    assert found.pop("load") == pytest.approx(wanted.pop("load"))
    assert found == pytest.approx(wanted)


def test_sums_of_processes_add_up():
    model, images = tiny("softmax_expert_choice"), torch.rand(10, 1, 8, 8)
    first, second = statistics_of(model, images[:4], 4), statistics_of(model, images[4:], 4)
    first.sums += second.sums
    assert first.layers() == statistics_of(model, images, 4).layers()


def test_a_forward_with_gradients_leaves_no_graph():
    model = tiny("softmax_expert_choice")
    statistics = RoutingStatistics(model, "cpu")
    with statistics.recording(torch.ones(4, dtype=torch.bool)):
        model(torch.rand(4, 1, 8, 8)).sum().backward()
    assert not statistics.sums.requires_grad and statistics.layers()


def test_a_dense_model_has_no_layers():
    assert statistics_of(tiny(None), torch.rand(4, 1, 8, 8), 2).layers() == {}


def test_layers_without_a_routing_are_left_out():
    assert RoutingStatistics(tiny("soft"), "cpu").layers() == {}


def test_names_are_the_names_without_wrappers():
    model, images = tiny("soft"), torch.rand(2, 1, 8, 8)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(checkpoint_wrapper(block), backend="eager")
    assert list(RoutingStatistics(model, "cpu").experts) == ["blocks.1.mlp"]
    with vr.inspect.record(model) as trace:
        model(images)
    assert list(trace.routings) == ["blocks.1.mlp"]
