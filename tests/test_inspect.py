"""record and Trace: statistics against the dense tensors, kinds of models, padding, pictures."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers.inspect import RoutingStatistics
from vmoe_routers.inspect.layer import normalised_mutual_information, selecting
from vmoe_routers.inspect.trace import HEADERS
from vmoe_routers.models import upcycle, vit_moe

BLOCKS = ["blocks.1.mlp", "blocks.2.mlp"]
LAST = "blocks.2.mlp"
OPTIONS = {
    "softmax_token_choice": {"top_k": 2, "capacity_factor": 0.4, "capacity_multiple_of": 1},
    "sinkhorn_token_choice": {"capacity_factor": 0.7, "capacity_multiple_of": 1},
    "sparsity_constrained_expert_choice": {"capacity_factor": 0.6},
    "soft": {"slots_per_expert": 3, "scale_init": 4.0},
}
SPARSE = [name for name in OPTIONS if name != "soft"]


def tiny(router, group_size=1, **options):
    torch.manual_seed(0)
    options = {"num_experts": 4, "group_size": group_size, **OPTIONS.get(router, {}), **options}
    return vit_moe(8, 2, 1, 3, embed_dim=16, depth=3, num_heads=2, router=router, moe_blocks="last_2", **options).eval()


@pytest.fixture(scope="module")
def traces():
    """Records every router on the same five images in groups of two. The last two images have padding."""
    torch.manual_seed(0)
    images, mask = torch.randn(5, 1, 8, 8), torch.ones(5, 16, dtype=torch.bool)
    mask[3:, 10:] = False
    found = {}
    for router in OPTIONS:
        model = tiny(router, group_size=2)
        with torch.no_grad(), vr.inspect.record(model) as trace:
            model(images, mask=mask)
        found[router] = trace
    return SimpleNamespace(images=images, mask=mask, of=found)


@pytest.mark.parametrize("router", OPTIONS)
def test_statistics_by_brute_force(traces, router):
    layer = traces.of[router].layers[1]
    assert layer.name == LAST and layer.num_images == 5 and len(layer.routings) == 2  # calls: four images, one image
    assert repr(layer).startswith(
        f"<LayerTrace {LAST!r}: {layer.title}, 5 images, {layer.num_experts} experts, load CV "
    )
    dispatch = [routing.dispatch_tensor().double() for routing in layer.routings]
    combine = [routing.combine_tensor().double() for routing in layer.routings]
    mask = traces.mask.flatten()
    by_token = torch.cat([d.sum(3).flatten(0, 1) for d in (combine if router == "soft" else dispatch)])
    weight = torch.cat([c.sum(3).flatten(0, 1) for c in combine])
    assert by_token[~mask].abs().max() == 0
    torch.testing.assert_close(layer.load, by_token.sum(0) / 5)
    assert layer.load_cv == pytest.approx(float(layer.load.std(correction=0) / layer.load.mean()))
    assert layer.dead_experts == int((layer.load == 0).sum())
    dropped = by_token.sum(1) == 0
    assert layer.dropped == pytest.approx(float(dropped[mask].double().mean()))
    slots = sum(d.shape[0] * d.shape[2] * d.shape[3] for d in dispatch)
    filled = slots if router == "soft" else float(sum(d.sum() for d in dispatch))
    assert layer.utilisation == pytest.approx(filled / slots)
    wanted = torch.where(by_token > 0, weight, -1).argmax(1)
    wanted[dropped], wanted[~mask] = -1, -2
    assert layer.experts().tolist() == wanted.tolist()
    if router == "softmax_token_choice":
        assert layer.dropped_requests == pytest.approx(1 - filled / (2 * int(mask.sum()))) and layer.dropped > 0
    if router == "sinkhorn_token_choice":
        assert layer.dropped_requests == layer.dropped > 0


@pytest.mark.parametrize("router", OPTIONS)
def test_statistics_are_those_of_many_batches(traces, router):
    model = tiny(router, group_size=2)
    statistics = RoutingStatistics(model, "cpu")
    for images, mask in ((traces.images[:2], traces.mask[:2]), (traces.images[2:], traces.mask[2:])):
        with torch.no_grad(), statistics.recording(torch.ones(len(images), dtype=torch.bool)):
            model(images, mask=mask)
    layer, found = traces.of[router].layers[0], statistics.layers()[BLOCKS[0]]
    assert found.pop("load") == pytest.approx(layer.load.tolist())
    assert found == pytest.approx({name: getattr(layer, name) for name in found})


def test_padding_does_not_count():
    """Images with padding have the statistics of their real tokens alone."""
    for router in OPTIONS:
        torch.manual_seed(0)
        layer = vr.MoEMlp(16, 8, num_experts=4, router=router, **OPTIONS[router]).eval()
        if router != "soft":
            layer.router.slots = lambda tokens: 3  # the capacity of a group without padding
        x = torch.randn(2, 10, 16)
        padded, mask = torch.cat([x, torch.full((2, 6, 16), torch.nan)], 1), torch.arange(16).expand(2, -1) < 10
        with torch.no_grad(), vr.inspect.record(layer) as short:
            layer(x)
        with torch.no_grad(), vr.inspect.record(layer) as long:
            layer(padded, mask)
        wanted, found = short.to_dict(), long.to_dict()
        for name in HEADERS:
            (value,), (expected,) = found[name], wanted[name]
            close = value is None if expected is None else value == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert close, (router, name, value, expected)
        table = long.layers[0].by_class([0, 1])
        torch.testing.assert_close(table, short.layers[0].by_class([0, 1]), rtol=1e-4, atol=1e-6)
        assert long.layers[0].experts().view(2, 16)[:, 10:].eq(-2).all()


def test_mutual_information_by_its_definition():
    a = torch.randint(5, (60,)).tolist()
    b = [x if torch.rand(()) < 0.5 else int(torch.randint(3, ())) for x in a]
    pairs, n = list(zip(a, b)), 60
    table = torch.zeros(5, 5, dtype=torch.float64)
    information = 0.0
    for x, y in pairs:
        table[x, y] += 1
        information += math.log(n * pairs.count((x, y)) / (a.count(x) * b.count(y))) / n
    entropies = [-sum(math.log(values.count(x) / n) / n for x in values) for values in (a, b)]
    assert normalised_mutual_information(table) == pytest.approx(2 * information / sum(entropies))


def test_mutual_information_at_the_limits():
    eye = torch.eye(3, dtype=torch.float64)
    assert normalised_mutual_information(eye[:, [2, 0, 1]]) == pytest.approx(1)
    assert normalised_mutual_information(torch.ones(3, 4, dtype=torch.float64)) == pytest.approx(0, abs=1e-9)
    assert normalised_mutual_information(eye[:1, :1]) == 1 and normalised_mutual_information(0 * eye) == 0


@pytest.mark.parametrize("router", OPTIONS)
def test_agreement_of_consecutive_layers(traces, router):
    first, second = traces.of[router].layers
    assert first.agreement is None
    pairs = [(a, b) for a, b in zip(first.experts().tolist(), second.experts().tolist()) if min(a, b) >= 0]
    table = torch.zeros(4, 4, dtype=torch.float64)
    for a, b in pairs:
        table[a, b] += 1
    assert second.agreement == pytest.approx(normalised_mutual_information(table))


def test_layers_of_different_tokens_do_not_agree():
    model = nn.Sequential(*(vr.MoEMlp(8, num_experts=2, router="softmax_expert_choice") for _ in range(2))).eval()
    with vr.inspect.record(model) as trace:
        model[1](model[0](torch.randn(2, 4, 8))[:, :3])
    assert trace.layers[1].agreement is None
    assert vr.inspect.record(model).__enter__().layers == []  # nothing ran


def test_similarity_of_slots(traces):
    layer = traces.of["soft"].layers[1]
    values = []
    for routing in layer.routings:
        slots = routing.dispatch_tensor().flatten(2).double()
        for group in slots:
            pairs = nn.functional.cosine_similarity(group.T.unsqueeze(0), group.T.unsqueeze(1), dim=2)
            values.append(float(pairs[~torch.eye(12, dtype=torch.bool)].mean()))
    assert layer.slot_similarity == pytest.approx(sum(values) / len(values)) and layer.slot_similarity < 0.99
    assert all(traces.of[router].layers[0].slot_similarity is None for router in SPARSE)


def test_equal_slots_have_similarity_1():
    layer = vr.MoEMlp(16, 8, num_experts=4, router="soft", slots_per_expert=2).eval()
    with torch.no_grad(), vr.inspect.record(layer) as trace:
        layer.router.scale.zero_()
        layer(torch.randn(2, 10, 16))
    assert trace.layers[0].slot_similarity == pytest.approx(1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("router", [name for name in vr.ROUTERS if name != "soft"])
@pytest.mark.parametrize("combine", [None, "plan"])
def test_the_gates_that_selected(router, training, combine):
    """In training, the gates have the noise of the forward."""
    if combine and router.startswith("softmax"):
        pytest.skip("softmax routers have no plan")
    made = vr.create_router(router, 16, 4, **({"combine": combine} if combine else {})).train(training)
    routing = made(torch.randn(2, 12, 16))
    gates = selecting(routing)
    assert not gates.requires_grad
    if routing.expert is not None:
        assert torch.equal(gates.argmax(2), routing.expert[..., 0].long())
    else:
        chosen = gates.topk(routing.capacity, dim=1).indices.transpose(1, 2)
        assert torch.equal(chosen.sort().values, routing.token.long().sort().values)


def test_errors_of_the_marginals(traces):
    (layer, _) = traces.of["sinkhorn_token_choice"].layers
    errors = []
    for routing in layer.routings:
        errors.append(vr.sinkhorn(routing.gates.source, mask=routing.mask, return_error=True)[1])
    assert layer.expert_error == pytest.approx(float(torch.cat(errors).mean()), rel=1e-2, abs=1e-6)
    assert layer.token_error == pytest.approx(0, abs=1e-5)
    (sparse, _) = traces.of["sparsity_constrained_expert_choice"].layers
    tokens = []
    for routing in sparse.routings:
        plan = vr.ksparse_transport(routing.gates.source.softmax(-1), routing.capacity, mask=routing.mask)
        for rows, mask in zip(plan.sum(2), routing.mask):
            tokens.append(float((rows[mask] - 1).abs().max()))
    assert sparse.token_error == pytest.approx(sum(tokens) / len(tokens)) and sparse.token_error > 0.1
    assert sparse.expert_error == pytest.approx(0, abs=1e-5)
    (softmax, _) = traces.of["softmax_token_choice"].layers
    assert softmax.token_error is None and softmax.expert_error is None


@pytest.mark.parametrize("router", OPTIONS)
def test_experts_by_classes(traces, router):
    layer = traces.of[router].layers[0]
    labels = [0, 2, 0, 2, 2]
    table = layer.by_class(torch.tensor(labels), 4)
    loads = torch.cat([taken.sum(1) for taken, _ in layer.weights()]).double()
    wanted = torch.stack([loads[[0, 2]].sum(0), 0 * loads[0], loads[[1, 3, 4]].sum(0), 0 * loads[0]])
    torch.testing.assert_close(table, wanted / wanted.sum(1, keepdim=True).clamp(min=1e-9))
    for wrong in ([0, 1], [0.0] * 5, [0, 1, 2, 3, -1]):
        with pytest.raises(ValueError, match=r"by_class: labels must be"):
            layer.by_class(wrong)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 1\]"):
        layer.by_class(labels, 2)


def test_tables(traces):
    from rich.console import Console

    for router, trace in traces.of.items():
        columns = trace.to_dict()
        assert {len(column) for column in columns.values()} == {2} and columns["layer"] == BLOCKS
        assert columns["load"][0] == pytest.approx(trace.layers[0].load.tolist())
        console = Console(width=80)
        with console.capture() as capture:
            console.print(trace.summary())
        lines = capture.get().splitlines()
        assert BLOCKS[1] in lines[-1] and f"{trace.layers[1].dropped:.3f}" in lines[-1]
        assert "…" not in capture.get() and ("alike" in capture.get()) == (router == "soft")
        assert ("requests" in capture.get()) == (router == "softmax_token_choice")


def test_tensorboard(traces):
    rows = []
    writer = SimpleNamespace(add_scalar=lambda *row: rows.append(row))
    trace = traces.of["soft"]
    trace.write_tensorboard(writer, 7)
    assert (f"routing/{LAST}/slot_similarity", trace.layers[1].slot_similarity, 7) in rows
    assert len({tag for tag, _, _ in rows}) == len(rows) and all(
        isinstance(value, (int, float)) for _, value, _ in rows
    )
    assert not any("error" in tag or tag.endswith("requests") for tag, _, _ in rows)


def hooks(model):
    return [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]


class Own(nn.Module):
    """A model of two layers that share a router, between other modules. A layer gets its tokens by keyword."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(1, 16, 2, 2)
        self.first = vr.MoEMlp(16, num_experts=4, router="softmax_expert_choice")
        self.second = vr.MoEMlp(16, num_experts=4, router=self.first.router)

    def forward(self, images):
        tokens = self.embed(images).flatten(2).mT
        return self.second(x=tokens + self.first(x=tokens)).mean(1)


def kinds():
    timm, torchvision = pytest.importorskip("timm"), pytest.importorskip("torchvision")
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    yield "timm", timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes), 17
    yield "torchvision", torchvision.models.VisionTransformer(8, 2, 2, 2, 16, 32), 17
    yield "own", Own(), 16


@pytest.mark.parametrize("training", [False, True])
def test_kinds_of_models(training):
    for kind, dense, tokens in kinds():
        options = {"num_experts": 4, "router": "softmax_expert_choice"}
        model = (dense if kind == "own" else upcycle(dense, blocks="last_2", **options)).train(training)
        images = torch.randn(3, 3 if kind == "torchvision" else 1, 8, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16), vr.inspect.record(model) as trace:
            model(images)
        assert not hooks(model)
        first, second = trace.layers
        assert (first.num_images, len(first.experts()), second.agreement is None) == (3, 3 * tokens, False), kind
        assert sum(first.load.tolist()) > 0 and first.title == "Softmax Expert Choice"
        if kind == "own":
            assert [layer.name for layer in trace.layers] == ["first", "second"]
        figure = trace.plot_tokens(images[0], 2)
        assert len(figure.axes) == 3


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch has no batching rule for our ops
def test_record_refuses_vmap_and_wrong_types():
    layer = vr.MoEMlp(4, 8, num_experts=2, router="soft")
    with pytest.raises(TypeError, match="record: eager must be a bool, got int"), vr.inspect.record(layer, eager=1):
        pass
    with vr.inspect.record(layer) as trace:
        with pytest.raises(ValueError, match=r"record: the model must not run under torch.func.vmap"):
            torch.func.vmap(layer)(torch.randn(3, 1, 5, 4))
        layer(torch.randn(3, 5, 4))
    assert trace.layers[0].num_images == 3


def test_own_routing():
    """A routing that has only the dense tensors."""

    class Dense(vr.Routing):
        def __init__(self, x):
            self.num_groups, self.num_tokens, self.num_experts, self.capacity = *x.shape[:2], 2, 1
            self.device = x.device

        def dispatch_tensor(self):
            dense = torch.zeros(self.num_groups, self.num_tokens, 2, 1)
            dense[:, 0, 1] = 1
            return dense

        combine_tensor = dispatch_tensor

        def dispatch(self, x):
            return torch.einsum("gtd,gtec->egcd", x, self.dispatch_tensor())

        def combine(self, y):
            return torch.einsum("egcd,gtec->gtd", y, self.combine_tensor())

    class Router(nn.Module):
        dim, num_experts = 8, 2

        def forward(self, x, mask=None):
            return Dense(x)

    layer = vr.MoEMlp(8, num_experts=2, router=Router())
    with vr.inspect.record(layer) as trace:
        layer(torch.randn(2, 4, 8))
    (found,) = trace.layers
    assert found.title == "Router" and found.load.tolist() == [0, 1] and found.dead_experts == 1
    assert found.experts().tolist() == [1, -1, -1, -1] * 2 and found.dropped == 0.75
    with pytest.raises(ValueError, match="plot_plan: layer '': a routing with gates is wanted, got Dense"):
        trace.plot_plan()


def labels_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


@pytest.mark.parametrize("router", OPTIONS)
def test_picture_of_tokens(traces, router):
    """Checks the picture of image 4: its group, the marks, and the colours."""
    trace = traces.of[router]
    figure = trace.plot_tokens(traces.images[4], 4)
    for ax, layer in zip(figure.axes[1:], trace.layers):
        experts = layer.experts().view(5, 16)[4]
        (crosses,) = ax.lines
        assert len(crosses.get_xdata()) == int((experts == -1).sum())
        overlay = torch.tensor(ax.images[1].get_array()).flatten(0, 1)
        assert torch.equal(overlay[10:], torch.tensor([1.0, 1.0, 1.0, 0.8]).expand(6, 4))  # padding
        same = experts[:10].unsqueeze(0) == experts[:10].unsqueeze(1)
        assert torch.equal((overlay[:10, None, :3] == overlay[None, :10, :3]).all(2), same)
    present = {int(e) for layer in trace.layers for e in layer.experts().view(5, 16)[4] if e >= 0}
    assert [text for text in labels_of(figure) if text.startswith("expert")] == [f"expert {e}" for e in sorted(present)]
    assert "padding" in labels_of(figure)
    assert len(trace.plot_tokens(traces.images[4], -1, layers=[-1]).axes) == 2


def test_patches_have_numbers_where_experts_are_many():
    layer = vr.MoEMlp(16, 8, num_experts=20, router="softmax_token_choice").eval()
    with torch.no_grad(), vr.inspect.record(layer) as trace:
        layer(torch.randn(1, 4 * 8 + 2, 16))
    figure = trace.plot_tokens(torch.rand(3, 4, 8))
    experts = [int(e) for e in trace.layers[0].experts()[2:] if e >= 0]  # after two tokens without a patch
    assert [int(text.get_text()) for text in figure.axes[1].texts] == experts
    assert not any(text.startswith("expert") for text in labels_of(figure))


def test_other_pictures(traces):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    trace, soft, before = traces.of["sinkhorn_token_choice"], traces.of["soft"], pyplot.get_fignums()
    bars = trace.plot_load().axes[1].patches
    assert [bar.get_height() for bar in bars] == pytest.approx(trace.layers[1].load.tolist())

    plan = trace.plot_plan(1, 2)  # the last image alone, with six padded tokens
    _, _, heat, sums, *_ = plan.axes
    assert heat.images[0].get_array().shape == (4, 10)
    assert [bar.get_width() for bar in sums.patches] == pytest.approx([2.5] * 4, rel=1e-3)

    slots = soft.plot_slots(traces.images[1], 1)
    maps = [ax.images[0].get_array() for ax in slots.axes[1:-1]]
    first = soft.layers[1].routings[0].dispatch_tensor()[0, 16:, 0, 0].view(4, 4) * 32
    assert len(maps) == 12 and torch.allclose(torch.tensor(maps[0].data), first)

    table = trace.plot_specialisation([0, 1, 0, 1, 1], ["cat", "dog"]).axes[0]
    assert [text.get_text() for text in table.get_yticklabels()] == ["cat", "dog"]
    wanted = trace.layers[0].by_class([0, 1, 0, 1, 1])
    assert torch.allclose(torch.tensor(table.images[0].get_array().data), wanted)
    assert pyplot.get_fignums() == before


def test_pictures_refuse(traces):
    trace, image = traces.of["sinkhorn_token_choice"], traces.images[0]
    for call, words in (
        (lambda: trace.plot_slots(image), f"plot_slots: layer '{LAST}' must be Soft MoE, got Sinkhorn Token Choice"),
        (lambda: traces.of["soft"].plot_plan(), f"plot_plan: layer '{LAST}': a routing with gates is wanted"),
        (lambda: trace.plot_plan(group=3), r"plot_plan: group must be in \[0, 2\]"),
        (lambda: trace.plot_tokens(image, 5), r"plot_tokens: index must be in \[0, 4\]"),
        (lambda: trace.plot_tokens(image, layers=[2]), r"plot_tokens: layer must be in \[-2, 1\], got 2"),
        (lambda: trace.plot_tokens(torch.rand(2, 8, 8)), "image must be a picture"),
        (lambda: trace.plot_tokens(image / 0), "image must have finite values"),
        (lambda: trace.plot_tokens(torch.rand(3, 8, 56)), "16 tokens are no grid of square patches"),
        (lambda: trace.plot_tokens(image, grid=(5, 4)), "grid must be rows and columns of at most 16 patches"),
        (lambda: vr.inspect.Trace({}).plot_load(), "plot_load: no routing is recorded"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
