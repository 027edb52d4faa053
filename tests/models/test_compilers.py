"""Whole models under torch.compile, torch.export, torch.func, autocast and activation checkpointing."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers.models import vit_moe

ROUTERS = [None, *vr.ROUTERS]


def model_of(router, **options):
    torch.manual_seed(0)
    if router is not None:
        options = {"num_experts": 4, "group_size": 1 if router == "soft" else 2, **options}
    if router == "soft":
        options = {"capacity_factor": 1.0, **options}
    model = vit_moe(8, 2, 1, 10, **{"depth": 2, **options}, embed_dim=16, num_heads=2, mlp_ratio=2.0, router=router)
    nn.init.normal_(model.head.weight)
    return model


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", ROUTERS)
def test_compiles_once_for_every_batch_size(router, training, compiler):
    """Training has gradients, and eval has none. The backward is traced once: its ops do not depend on the mode."""
    model = model_of(router, depth=1).train(training)
    # With dynamic=True, a model that has numbers, such as a capacity factor, is traced twice and gives the same graph.
    # So one model is compiled with dynamic=True. For the other models, the dynamic axis is marked.
    by_mark = (router, training) != ("soft", True)
    step = torch.compile(model, fullgraph=True, dynamic=None if by_mark else True, backend="aot_eager")
    for count, batch in enumerate((4, 8, 6)):
        x = torch.randn(batch, 1, 8, 8)
        if by_mark:
            torch._dynamo.maybe_mark_dynamic(x, 0)
        with torch.set_grad_enabled(training):
            with torch.compiler.set_stance("default" if count == 0 else "fail_on_recompile"):
                torch.manual_seed(1)
                found = step(x)
            torch.manual_seed(1)
            torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-5)
        if training:
            found.square().mean().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("router", ROUTERS)
def test_exports_saves_and_reloads(router, tmp_path):
    model = model_of(router, depth=1).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    # A group has two images, or one image in Soft MoE and in the dense model.
    shapes = {"x": {0: 2 * batch if router not in (None, "soft") else batch}}
    program = torch.export.export(model, (torch.randn(4, 1, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for size in (4, 10):
        x = torch.randn(size, 1, 8, 8)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_exports_a_layer_for_every_number_of_tokens(router, tmp_path):
    options = {} if router == "soft" else {"capacity_factor": 0.8}
    layer = vr.MoEMlp(16, 24, num_experts=4, router=router, **options).eval()
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=512)}
    program = torch.export.export(
        layer, (torch.randn(2, 24, 16), torch.rand(2, 24) > 0.3), dynamic_shapes={"x": sizes, "mask": sizes}
    )
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for batch, tokens in ((2, 2), (5, 7), (3, 100)):  # 1, 1 or 4, and 20 slots per expert
        x, mask = torch.randn(batch, tokens, 16), torch.rand(batch, tokens) > 0.3
        torch.testing.assert_close(loaded(x, mask), layer(x, mask), rtol=1e-4, atol=1e-5)


def test_exports_a_model_for_every_size_of_images():
    model = model_of("softmax_expert_choice", group_size=1, depth=1, dynamic_img_size=True).eval()
    side = 2 * torch.export.Dim("side", min=2, max=32)
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64), 2: side, 3: side}}
    program = torch.export.export(model, (torch.randn(2, 1, 16, 16),), dynamic_shapes=shapes).module()
    for size in (4, 14):
        x = torch.randn(3, 1, size, size)
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rounding", "multiple_of"), [("ceil", 4), ("round", 1), ("round", 3), ("ceil", 0)])
def test_exports_the_capacity_as_it_is_computed(rounding, multiple_of):
    class Capacity(nn.Module):
        def forward(self, x):
            return x.new_ones(vr.capacity(x.shape[0], 5, 1.1, rounding, multiple_of))

    program = torch.export.export(Capacity(), (torch.ones(7),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    for tokens in (*range(2, 60), 10**6 + 1):
        assert len(program.module()(torch.ones(tokens))) == vr.capacity(tokens, 5, 1.1, rounding, multiple_of)


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_routing_is_float32_under_autocast(router):
    model = model_of(router, noise_std=0.0).train()
    x = torch.randn(4, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), vr.inspect.record(model) as trace:
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    (logits.float().square().mean() + vr.aux_loss(model)).backward()
    (routing,) = trace.routings["blocks.1.mlp"]
    assert routing.combine_tensor().dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name


@pytest.mark.parametrize("router", vr.ROUTERS)
def test_copies_pickles_and_moves(router):
    model = model_of(router).eval()
    x = torch.randn(2, 1, 8, 8)
    wanted = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), wanted)
    double = copy.deepcopy(model).double()
    assert double(x.double()).dtype == torch.float64
    torch.testing.assert_close(double(x.double()).float(), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("router", ["soft", "softmax_expert_choice"])
def test_parametrized_experts(router):
    model = model_of(router).eval()

    class Halved(nn.Module):
        def forward(self, weight):
            return weight / 2

    x = torch.randn(2, 1, 8, 8)
    reference = copy.deepcopy(model)
    reference.blocks[1].mlp.experts.w1.data /= 2
    nn.utils.parametrize.register_parametrization(model.blocks[1].mlp.experts, "w1", Halved())
    torch.testing.assert_close(model(x), reference(x))


# torch warns that vmap calls the ops once for every entry.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("router", vr.ROUTERS)
def test_vmap(router):
    router = vr.create_router(router, 4, 4).eval()
    x = torch.randn(3, 2, 6, 4)

    def layer(x):
        routing = router(x)
        return routing.combine(routing.dispatch(x).square())

    with torch.no_grad():
        assert torch.equal(torch.vmap(layer)(x), torch.stack([layer(part) for part in x]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("router", vr.ROUTERS)
def test_functional_call_and_gradients(router):
    """Outputs and gradients, also per image, equal autograd's. Second derivatives are refused, as in autograd."""
    model = model_of(router, group_size=1).eval()
    x = torch.randn(2, 1, 8, 8)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    torch.testing.assert_close(loss(parameters, x), model(x).square().sum())
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    torch.testing.assert_close(list(torch.func.grad(loss)(parameters, x).values()), list(wanted))
    by_image = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.unsqueeze(1))
    torch.testing.assert_close([g.sum(0) for g in by_image.values()], list(wanted), rtol=1e-4, atol=1e-5)
    layer = model.blocks[-1].mlp
    with pytest.raises(NotImplementedError, match="second derivatives are not supported"):
        torch.func.grad(lambda x: torch.func.grad(lambda x: layer(x).square().sum())(x).sum())(torch.randn(1, 6, 16))


@pytest.mark.parametrize("in_place", [False, True])
def test_record_runs_a_compiled_model_without_compilation(in_place, compiler):
    model = model_of("softmax_expert_choice").eval()
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        with vr.inspect.record(model) as wanted:
            model(x)
        compiled = model if in_place else torch.compile(model, backend="eager")
        if in_place:
            model.compile(backend="eager")
        compiled(x)
        with vr.inspect.record(compiled) as trace:
            compiled(x)
        with vr.inspect.record(compiled, eager=False) as nothing:
            compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(x)
    assert nothing.layers == []
    assert trace.to_dict() == wanted.to_dict() and trace.layers[0].name == "blocks.1.mlp"


def test_records_of_two_threads_end_in_any_order(compiler):
    model = model_of("softmax_expert_choice").eval()
    compiled, x = torch.compile(model, backend="eager"), torch.randn(2, 1, 8, 8)
    begun, ended, counts = threading.Event(), threading.Event(), []

    def later():
        with torch.no_grad(), vr.inspect.record(compiled) as trace:
            begun.set()
            ended.wait(60)
            compiled(x)
        counts.append(len(trace.layers))

    thread = threading.Thread(target=later)
    with vr.inspect.record(compiled):
        thread.start()
        begun.wait(60)
    ended.set()
    thread.join()
    assert counts == [len(model.blocks) - 1]
    with torch.no_grad(), vr.inspect.record(compiled, eager=False) as nothing:
        compiled(x)  # compiled again
    assert nothing.layers == []
