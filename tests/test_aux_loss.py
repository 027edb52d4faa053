"""aux_loss: every forward counts once and has a gradient, with every way of training a model."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import vmoe_routers as vr

OPTIONS = {"num_experts": 4, "noise_std": 0.0, "importance_loss_weight": 0.5, "load_loss_weight": 0.0}


def layer(**options):
    return vr.MoEMlp(5, 7, router="softmax_token_choice", **{**OPTIONS, **options})


def tokens(batch=4):
    return torch.randn(batch, 6, 5)


class Model(nn.Module):
    """A model of two residual layers, each of which can be skipped or checkpointed."""

    def __init__(self, wrap=lambda module, x: module(x)):
        super().__init__()
        self.layers = nn.ModuleList([layer(), layer()])
        self.wrap = wrap

    def forward(self, x, skip=()):
        for i, module in enumerate(self.layers):
            if i not in skip:
                x = x + self.wrap(module, x)
        return x


def reference(model, *batches, weight=1.0):
    """Computes the gradients with each layer's loss taken from the routing of its forward."""
    model = copy.deepcopy(model)
    model.wrap = lambda module, x: module(x)
    total = 0.0
    for x in batches:
        with vr.inspect.record(model) as trace:
            total = total + model(x).square().sum()
        total = total + weight * sum(r.aux_loss for routings in trace.routings.values() for r in routings)
    total.backward()
    return [p.grad for p in model.parameters()]


def assert_gradients(model, wanted, scale=1.0):
    for got, want in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(got.grad, want * scale, atol=1e-5, rtol=1e-4)


@pytest.fixture(autouse=True)
def _one_thread(one_thread): ...


def test_value_and_gradient():
    model, x = Model(), tokens()
    wanted = reference(model, x)
    with vr.inspect.record(model) as trace:
        out = model(x)
    values = [routings[0].losses["importance"] for routings in trace.routings.values()]
    torch.testing.assert_close(vr.aux_loss(model), 0.5 * sum(values))
    (out.square().sum() + vr.aux_loss(model)).backward()
    assert_gradients(model, wanted)


def test_alone_without_the_output():
    moe, x = layer(), tokens()
    moe(x)
    vr.aux_loss(moe).backward()
    assert moe.router.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logging_takes_no_gradient(mode):
    model, x = Model(), tokens()
    wanted = reference(model, x)
    with vr.inspect.record(model) as trace:
        out = model(x)
    with mode():
        for routings in trace.routings.values():
            assert routings[0].losses["importance"] > 0
            assert routings[0].metrics["load"].sum() > 0
        logged = float(vr.aux_loss(model))
    loss = vr.aux_loss(model)
    assert loss.item() == pytest.approx(logged) == pytest.approx(vr.aux_loss(model).item())
    (out.square().sum() + loss).backward()
    assert_gradients(model, wanted)


@pytest.mark.parametrize("backward", [True, False])
def test_a_layer_that_did_not_run_counts_nothing(backward):
    model, x = Model(), tokens()
    out = model(x)
    if backward:
        out.sum().backward()
    del out
    with vr.inspect.record(model) as trace:
        out = model(x, skip=(1,))
    torch.testing.assert_close(vr.aux_loss(model), trace.routings["layers.0"][0].aux_loss)
    (out.sum() + vr.aux_loss(model)).backward()
    assert vr.aux_loss(model) == 0


def test_zero_after_backward_and_in_eval():
    model, x = Model(), tokens()
    assert vr.aux_loss(model) == 0
    model(x).sum().backward()
    assert vr.aux_loss(model) == 0, "a backward pass went through the forward, the loss was not read"
    model.eval()(x)
    assert vr.aux_loss(model) == 0
    model.train()
    with torch.no_grad():
        model(x)
    assert vr.aux_loss(model) == 0
    dense = nn.Linear(2, 2, device="meta")
    assert vr.aux_loss(dense).device.type == "meta"


def test_gradient_accumulation():
    model, batches = Model(), [tokens(), tokens(), tokens()]
    wanted = reference(model, *batches)
    for x in batches:
        out = model(x)
        (out.square().sum() + vr.aux_loss(model)).backward()
    assert_gradients(model, wanted)


def test_several_forwards_before_one_backward():
    model, batches = Model(), [tokens(), tokens(), tokens()]
    wanted = reference(model, *batches)
    outputs = [model(x) for x in batches]
    (sum(out.square().sum() for out in outputs) + vr.aux_loss(model)).backward()
    assert_gradients(model, wanted)


def test_weight_and_gradient_scaling():
    model, x = Model(), tokens()
    wanted = reference(model, x, weight=3.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    out = model(x)
    scaler.scale(out.square().sum() + 3 * vr.aux_loss(model)).backward()
    assert_gradients(model, wanted, scale=64.0)


CHECKPOINTS = {
    "re-entrant": lambda module, x: checkpoint(module, x, use_reentrant=True),
    "not re-entrant": lambda module, x: checkpoint(module, x, use_reentrant=False),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_checkpoints(kind, weight):
    model, batches = Model(CHECKPOINTS[kind]), [tokens(), tokens(), tokens()]
    wanted = reference(model, *batches[:2], weight=weight)
    outputs = [model(x.requires_grad_()) for x in batches[:2]]
    with torch.no_grad():
        logged = float(vr.aux_loss(model))
    loss = vr.aux_loss(model)
    assert loss.item() == pytest.approx(logged)
    (sum(out.square().sum() for out in outputs) + weight * loss).backward()
    assert_gradients(model, wanted)
    assert vr.aux_loss(model) == 0
    model.zero_grad()
    wanted = reference(model, batches[2], weight=0.0)
    model(batches[2].requires_grad_()).square().sum().backward()
    assert_gradients(model, wanted)
    assert vr.aux_loss(model) == 0, "the loss was not read, and its forward is used up"


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled(checkpointed):
    torch._dynamo.reset()
    model = Model(CHECKPOINTS["not re-entrant"]) if checkpointed else Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batches in ([tokens()], [tokens(), tokens()], [tokens()]):
        wanted = reference(model, *batches, weight=2.0)
        model.zero_grad()
        outputs = [compiled(x) for x in batches]
        with torch.no_grad():
            logged = float(vr.aux_loss(model))
        loss = vr.aux_loss(compiled)
        assert loss.item() == pytest.approx(logged) == pytest.approx(vr.aux_loss(model).item())
        (sum(out.square().sum() for out in outputs) + 2 * loss).backward()
        assert_gradients(model, wanted)
        del loss
        assert vr.aux_loss(model) == 0
    for _ in range(2):  # the loss is read, but gets no backward
        compiled(batches[0]).sum().backward()
        assert vr.aux_loss(model) == 0
        out = compiled(batches[0])
        assert vr.aux_loss(model).item() == pytest.approx(logged)
        out.sum().backward()
        assert vr.aux_loss(model) == 0


def test_a_checkpoint_around_compiled_layers():
    torch._dynamo.reset()
    model = Model()
    model.wrap = lambda module, x: checkpoint(module.compiled, x, use_reentrant=False)
    for module in model.layers:
        object.__setattr__(module, "compiled", torch.compile(module, fullgraph=True, backend="aot_eager"))
    plain = Model()
    plain.load_state_dict(model.state_dict())
    for _ in range(3):
        x = tokens()
        wanted = reference(plain, x)
        model.zero_grad()
        out = model(x)
        (out.square().sum() + vr.aux_loss(model)).backward()
        assert_gradients(model, wanted)


@pytest.mark.parametrize("router", ["softmax_token_choice", "soft"])
def test_a_checkpointed_vit_compiles(router):
    pytest.importorskip("timm")
    from vmoe_routers.models import vit_moe

    torch._dynamo.reset()
    model = vit_moe(8, 4, embed_dim=16, depth=2, num_heads=2, num_classes=3, router=router, num_experts=2)
    model.set_grad_checkpointing(True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for function in (model, compiled):
        torch.manual_seed(0)
        model.zero_grad()
        (function(x).square().sum() + vr.aux_loss(model)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_replicas_report_to_the_original():
    """Runs shallow copies of the modules, each in a thread on its part of the batch, as nn.DataParallel does."""
    moe, x = layer(), tokens(8)
    alone = copy.deepcopy(moe)
    alone(x)
    replicas = []
    for _ in range(2):
        replica = moe._replicate_for_data_parallel()
        replica._modules = dict(moe._modules)
        replicas.append(replica)
    outputs = [None, None]

    def run(i):
        outputs[i] = replicas[i](x.chunk(2)[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(vr.aux_loss(moe), vr.aux_loss(alone))
    vr.aux_loss(moe).backward()
    vr.aux_loss(alone).backward()
    torch.testing.assert_close(moe.router.weight.grad, alone.router.weight.grad)


@pytest.mark.parametrize("router", vr.ROUTERS)
@pytest.mark.parametrize("training", [False, True])
def test_a_forward_leaves_nothing_behind(router, training):
    moe = vr.MoEMlp(5, 7, num_experts=4, router=router).train(training)
    kept = []
    moe.router.logits.register_forward_hook(lambda module, args, logits: kept.append(weakref.ref(logits)))
    for _ in range(3):
        with torch.set_grad_enabled(training):
            out = moe(tokens())
            if training:
                out.sum().backward()
    del out
    gc.collect()
    assert [ref() for ref in kept] == [None] * 3


def test_forwards_without_backward_keep_one_loss_at_most():
    moe, kept = layer(), []
    moe.router.logits.register_forward_hook(lambda module, args, logits: kept.append(weakref.ref(logits)))
    for _ in range(5):
        moe(tokens())
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= 1


def test_copies_and_pickles_start_empty():
    moe = layer()
    moe(tokens())
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert vr.aux_loss(other) == 0
        assert other.pending_losses is not moe.pending_losses
    assert vr.aux_loss(moe) > 0


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [None, "re-entrant", "not re-entrant"])
def test_a_loss_read_for_every_micro_batch_counts_once(kind, compiled):
    if compiled and kind:
        pytest.skip("test_compiled covers compiled checkpoints")
    torch._dynamo.reset()
    model = Model(CHECKPOINTS[kind]) if kind else Model()
    batches = [tokens(), tokens(), tokens()]
    wanted = reference(model, *batches)
    function = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    losses = []
    for x in batches:
        loss = function(x.requires_grad_()).square().sum()
        assert vr.aux_loss(model).item() > 0, "read for a log, and dropped"
        aux = vr.aux_loss(model)
        assert vr.aux_loss(model).item() == aux.item()
        losses.append(loss + aux)
    sum(losses).backward()
    assert_gradients(model, wanted)
    assert vr.aux_loss(model) == 0


def test_a_step_that_is_abandoned_counts_no_more():
    model, x = Model(), tokens()
    loss = model(tokens()).square().sum() + vr.aux_loss(model)
    assert loss > 0  # the loss gets no backward, as if it were not finite
    wanted = reference(model, x)
    new = model(x).square().sum() + vr.aux_loss(model)
    new.backward()
    assert_gradients(model, wanted)


@pytest.mark.parametrize("kind", [None, *CHECKPOINTS])
def test_the_losses_of_two_micro_batches_go_backward_in_their_order(kind):
    model = Model(CHECKPOINTS[kind]) if kind else Model()
    batches = [tokens().requires_grad_() for _ in range(2)]
    wanted = reference(model, *batches)
    losses = [model(x).square().sum() + vr.aux_loss(model) for x in batches]
    for loss in losses:
        loss.backward()
    assert_gradients(model, wanted)


@pytest.mark.parametrize("kind", [None, *CHECKPOINTS])
def test_layers_read_for_a_log_count_in_the_model_too(kind):
    model, x = Model(CHECKPOINTS[kind]) if kind else Model(), tokens().requires_grad_()
    wanted = reference(model, x)
    y = model(x)
    log = [vr.aux_loss(module) for module in model.layers]
    loss = y.square().sum() + vr.aux_loss(model)
    assert all(value > 0 for value in log)
    loss.backward()
    assert_gradients(model, wanted)


def test_a_loss_read_twice_stays_in_its_total_when_the_first_value_goes():
    model, losses = Model(), []
    batches = [tokens(), tokens()]
    wanted = reference(model, *batches)
    for x in batches:
        y = model(x)
        log = vr.aux_loss(model)
        losses.append(y.square().sum() + vr.aux_loss(model))
        del log
    sum(losses).backward()
    assert_gradients(model, wanted)


@pytest.mark.parametrize("copied", [False, True])
def test_compiled_steps_that_do_not_read_the_loss(copied):
    torch._dynamo.reset()
    model = copy.deepcopy(Model()) if copied else Model()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = tokens()
    for _ in range(3):
        compiled(x).sum().backward()
    out = compiled(x)
    wanted = reference(model, x)
    model.zero_grad()
    (out.square().sum() + vr.aux_loss(model)).backward()
    assert_gradients(model, wanted)


def check_compiled_losses_end(layer):
    """The sum of compiled losses is on the device of the parameters. A backward through the parameters removes it."""
    sums = layer.pending_losses
    assert sums.compiled.device.type == "cpu"
    sums.compiled = torch.zeros((), requires_grad=True)
    layer(torch.randn(2, 4, 8)).sum().backward()
    assert not sums.compiled.requires_grad


def test_layers_that_were_made_on_meta_can_be_moved_and_trained():
    made = [vr.MoEMlp(8, num_experts=2, router="softmax_token_choice") for _ in range(2)]
    with torch.device("meta"):
        loaded, empty = (vr.MoEMlp(8, num_experts=2, router="softmax_token_choice") for _ in range(2))
    loaded.load_state_dict(made[0].state_dict(), assign=True)
    check_compiled_losses_end(loaded)
    check_compiled_losses_end(loaded.to("cpu"))
    empty.to_empty(device="cpu").load_state_dict(made[1].state_dict())
    check_compiled_losses_end(empty)


def test_layers_can_be_converted_by_swapping_their_parameters():
    layer = vr.MoEMlp(5, 7, num_experts=2, router="softmax_token_choice")
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float64, torch.float32):  # torch.nn.Module refuses to swap a tensor with weak references
            layer.to(dtype)
            (layer(tokens().to(dtype)).sum() + vr.aux_loss(layer)).backward()
            layer.zero_grad()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
