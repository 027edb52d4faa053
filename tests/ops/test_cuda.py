"""CUDA tensors: a clear error without CUDA kernels, and on a GPU the properties that only a GPU can show."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import tied
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_routers as vr
from vmoe_routers import models, ops


def on_cuda(op: str, *arguments):
    """Calls the op's CUDA kernel, for arguments on any device."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return getattr(torch.ops.vmoe_routers, op).default.redispatch(keys, *arguments)


def test_an_op_without_a_kernel_says_how_to_get_it():
    x, token = torch.randn(2, 3, 4), torch.zeros(2, 3, 1, dtype=torch.int32)
    experts = (x, x.mT, None, x, None, None, "gelu", False)
    calls = {"grouped_mlp": experts, "ksparse_projection": (x[0], 1), "topk": (x, 1, 1), "invert_slots": (token, 3)}
    if not ops.WITHOUT_CUDA:
        pytest.skip("the CUDA kernels are loaded")
    for op, arguments in calls.items():
        with pytest.raises(NotImplementedError, match=rf"vmoe_routers: {op} .*CUDA"):
            on_cuda(op, *arguments)


def test_cuda_on_host_runs_the_cuda_kernels(request):
    if not request.config.getoption("--cuda-on-host"):
        pytest.skip("needs --cuda-on-host")
    # The CPU kernel takes no 16-bit tensors.
    out = torch.ops.vmoe_routers.soft_mix(torch.zeros(1, 4, 3), torch.ones(1, 4, 8, dtype=torch.bfloat16), 1, 3)
    assert torch.equal(out, torch.ones(3, 1, 1, 8, dtype=torch.bfloat16))


def test_every_op_has_a_kernel_or_a_refusal():
    registered = set(torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"))
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CPU"):
        if name.startswith("vmoe_routers::"):
            assert name in registered


LAYERS = [
    ("softmax_token_choice", {"top_k": 2, "batch_priority": True}),
    ("softmax_token_choice", {"top_k": 2, "renormalize": True}),
    ("sinkhorn_token_choice", {"combine": "plan", "tolerance": 1e-3}),
    ("softmax_expert_choice", {"renormalize": True}),
    ("sinkhorn_expert_choice", {"combine": "plan", "gradient": "implicit"}),
    ("sparsity_constrained_expert_choice", {}),
    ("soft", {"slots_per_expert": 3}),
]
on_every_layer = pytest.mark.parametrize(("router", "options"), LAYERS)


def make_layer(router: str, options: dict, device: str) -> vr.MoEMlp:
    return vr.MoEMlp(16, 32, num_experts=8, router=router, group_size=2, device=device, **options)


class WithLoss(torch.nn.Module):
    """Returns the output of a layer and its auxiliary loss."""

    def __init__(self, layer: vr.MoEMlp):
        super().__init__()
        self.layer = layer

    def forward(self, x, mask):
        return self.layer(x, mask), vr.aux_loss(self.layer)


@pytest.mark.parametrize("masked", [False, True])
@on_every_layer
def test_a_layer_reads_no_value_and_stays_on_its_device(router, options, masked):
    """Runs on fake tensors, without a GPU. Reading a value is an error, and mixing devices is an error."""
    layer = make_layer(router, options, "meta")
    with FakeTensorMode():
        model = WithLoss(layer)
        parameters = {name: torch.empty(p.shape, device="cuda") for name, p in model.named_parameters()}
        x = torch.empty(4, 9, 16, device="cuda")
        mask = torch.empty(4, 9, dtype=torch.bool, device="cuda") if masked else None
        with vr.inspect.record(layer) as trace:
            out, loss = torch.func.functional_call(model, parameters, (x, mask))
        (routing,) = trace.routings[""]
        results = [out, loss, *routing.losses.values(), *routing.metrics.values()]
        results += [routing.dispatch_tensor(), routing.combine_tensor()]
        assert {result.device.type for result in results} == {"cuda"}


@on_every_layer
def test_a_gradient_reads_no_value(router, options):
    """Runs the backward on fake tensors of the CPU, because torch runs a backward of fake tensors on the CPU only."""
    layer = make_layer(router, options, "meta")
    with FakeTensorMode():
        model = WithLoss(layer)
        parameters = {name: torch.empty(p.shape, requires_grad=True) for name, p in model.named_parameters()}
        x = torch.empty(4, 9, 16, requires_grad=True)
        out, loss = torch.func.functional_call(model, parameters, (x, torch.empty(4, 9, dtype=torch.bool)))
        (out.float().sum() + loss).backward()
        assert all(value.grad is not None for value in (x, *parameters.values()))


class Step:
    """A training step of a small ViT with MoE layers: forward, backward and the update of AdamW."""

    def __init__(self, router: str, options: dict, device: str):
        with torch.device(device):
            self.model = models.vit_moe(
                32, 8, num_classes=5, embed_dim=16, depth=2, num_heads=2, router=router, num_experts=4, group_size=2,
                **{"noise_std": 0.0, **options},
            )  # fmt: skip
        # AdamW divides by the root of the squared gradients plus eps. With eps far above rounding errors, a gradient
        # that is 0 up to rounding moves no parameter.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01, eps=1e-3, capturable=device == "cuda")

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(self.model(images), labels) + vr.aux_loss(self.model)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def load(self, other: Step) -> None:
        """Copy the state of `other`, so that this object continues from it."""
        self.model.load_state_dict(other.model.state_dict())
        self.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))  # load_state_dict does not copy

    def assert_equals(self, other: Step, rtol: float = 0.0, atol: float = 0.0) -> None:
        for ours, wanted in zip(self.model.parameters(), other.model.parameters(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=rtol, atol=atol)


@on_every_layer
def test_a_model_reads_no_value(router, options):
    """Runs a whole model on fake tensors, without a GPU."""
    model = Step(router, options, "meta").model
    with FakeTensorMode():
        parameters = {name: torch.empty(p.shape, device="cuda") for name, p in model.named_parameters()}
        out = torch.func.functional_call(model, parameters, torch.empty(4, 3, 32, 32, device="cuda"))
        assert out.device.type == "cuda" and out.shape == (4, 5)


@on_every_layer
def test_a_step_of_a_model_can_be_continued(router, options):
    """`Step.load` copies all state, which the comparison of a captured step with an eager step needs."""
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    step, other = Step(router, options, "cpu"), Step(router, options, "cpu")
    before = [p.detach().clone() for p in step.model.parameters()]
    step(images, labels)
    other.load(step)
    assert torch.equal(step(images, labels), other(images, labels))
    step.assert_equals(other)
    assert any(not torch.equal(p, was) for p, was in zip(step.model.parameters(), before, strict=True))


@on_every_layer
def test_a_step_of_a_model_leaves_no_graph(router, options):
    """Gradient nodes belong to the stream of their step. A capture on another stream fails if it meets such a node."""
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    step = Step(router, options, "cpu")

    def nodes():
        return [torch.autograd.graph.get_gradient_edge(p).node for p in step.model.parameters()]

    def mark(*_):
        for node in nodes():
            node.metadata["marked"] = True

    step.model.register_forward_hook(mark)
    step(images, labels)
    assert not any(node.metadata for node in nodes())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_soft_moe_routes_in_float32_and_mixes_in_16_bits(dtype):
    """Runs on fake tensors: 16-bit tokens reach the kernels unconverted, and results have the dtype of the tokens."""
    layer = make_layer("soft", {"slots_per_expert": 3}, "meta")
    with FakeTensorMode():
        parameters = {name: torch.empty(p.shape, dtype=dtype, device="cuda") for name, p in layer.named_parameters()}
        x = torch.empty(4, 9, 16, dtype=dtype, device="cuda")
        seen = Seen()
        with seen, vr.inspect.record(layer) as trace:
            out = torch.func.functional_call(layer, parameters, x)
        assert out.dtype == dtype
        assert trace.routings[""][0].logits.dtype == torch.float32
    assert seen.dtypes == {
        "soft_logits": [(dtype, torch.float32)],
        "soft_mix": [(torch.float32, dtype), (torch.float32, dtype)],
        "grouped_mlp": [(dtype,) * 5],
    }


class Seen(TorchDispatchMode):
    """The dtypes of the tensors in calls of this package's ops."""

    def __init__(self):
        super().__init__()
        self.dtypes: dict[str, list[tuple]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vmoe_routers":
            dtypes = tuple(a.dtype for a in args if isinstance(a, torch.Tensor))
            self.dtypes.setdefault(func.overloadpacket.__name__, []).append(dtypes)
        return func(*args, **(kwargs or {}))


def route(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Token Choice with batch priority, from logits to the sum of its slots."""
    gates = logits.softmax(-1)
    values, expert = ops.topk(gates, 2)
    _, source = ops.assign_slots(expert, logits.shape[-1], 5, values[..., 0])
    token = torch.where(source < 0, -1, source // 2)
    offsets, slots, _ = ops.invert_slots(token, x.shape[1])
    y = ops.dispatch(x, token, offsets, slots)
    flat = values.flatten(1).gather(1, source.flatten(1).clamp(min=0).long())
    return ops.combine(y, flat.view(source.shape), token, offsets, slots)


def choose_tokens(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Expert Choice with the gates that chose the tokens and the gates of a lookup."""
    values, token = ops.softmax_topk(logits, 5, 1)
    offsets, slots, _ = ops.invert_slots(token, x.shape[1])
    y = ops.dispatch(x, token, offsets, slots)
    return ops.combine(y, values + ops.softmax_gather(logits, token, 1), token, offsets, slots)


def mix(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Soft MoE without its experts."""
    logits = ops.soft_logits(x, x[0, :12].t())
    return ops.soft_mix(logits, ops.soft_mix(logits, x, 1, 4), 2)


def gradients(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The gradients of the two functions above, and of the gates of Token Choice."""
    x, logits = x.detach().requires_grad_(), logits.detach().requires_grad_()
    out = choose_tokens(x, logits).square().sum() + mix(x, logits).square().sum()
    out = out + ops.softmax_topk(logits, 2)[0].square().sum()
    of_x, of_logits = torch.autograd.grad(out, (x, logits))
    return torch.cat((of_x, of_logits), dim=-1)


def experts(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """An MLP per group with some unfilled rows, and the gradients of its input and of a weight."""
    x, w1 = x.detach().requires_grad_(), ((logits - logits.mean())[:, : x.shape[2]] / 100).requires_grad_()
    half = x.shape[1] // 2
    filled = (logits[:, :2, 0] > 0).int() * half - 3
    out = ops.grouped_mlp(x, w1, w1[:, 0], w1[:, : w1.shape[2]], None, "gelu_tanh", filled)
    of_x, of_w1 = torch.autograd.grad(out.square().sum(), (x, w1))
    return torch.cat((out.detach(), of_x, of_w1.mean(1, keepdim=True).expand_as(out)), dim=-1)


on_every_path = pytest.mark.parametrize("path", (route, choose_tokens, mix, experts, gradients))


def capture(step):
    """A CUDA graph of `step`, and its outputs, which are valid after a replay and while the graph exists."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = step()
    return graph, results


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
class TestOnAGpu:
    @on_every_path
    def test_a_graph_can_be_captured_and_replayed(self, path):
        x, logits = torch.randn(2, 30, 16, device="cuda"), tied(2, 30, 8, levels=9).float().cuda()
        graph, out = capture(lambda: path(x, logits))
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(out, path(x, logits))  # cuBLAS may choose another kernel outside of a graph

    @on_every_path
    def test_results_repeat_and_equal_the_results_of_the_cpu(self, path):
        x, logits = torch.randn(4, 196, 32, device="cuda"), tied(4, 196, 32, levels=50).float().cuda()
        first = path(x, logits)
        for _ in range(5):
            assert torch.equal(path(x, logits), first)
        torch.testing.assert_close(path(x.cpu(), logits.cpu()), first.cpu(), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("tokens", [196, 4000])
    def test_solvers_stop_without_the_host(self, tokens):
        """Solvers with one launch and with many make no call that a graph capture refuses."""
        logits = torch.randn(2, tokens, 32, device="cuda")

        def solve():
            x = logits.detach().requires_grad_()
            plans = [ops.sinkhorn(x, tolerance=1e-3, gradient=gradient) for gradient in ("unrolled", "implicit")]
            plans.append(ops.ksparse_transport(x.softmax(2), tokens // 32))
            (gradient,) = torch.autograd.grad(sum(plan.square().sum() for plan in plans), x)
            return *(plan.detach() for plan in plans), gradient

        graph, captured = capture(solve)
        logits.copy_(torch.randn_like(logits))
        graph.replay()
        for ours, wanted in zip(captured, solve(), strict=True):
            assert torch.equal(ours, wanted)

    @on_every_layer
    def test_a_training_step_of_a_layer_can_be_captured(self, router, options):
        """The step never waits for the GPU, and its replay gives the results of the step."""
        layer = make_layer(router, {"noise_std": 0.0, **options}, "cuda")
        x = torch.randn(4, 49, 16, device="cuda", requires_grad=True)
        leaves = [x, *layer.parameters()]

        def step():
            loss = layer(x).square().sum() + vr.aux_loss(layer)
            return loss.detach(), *torch.autograd.grad(loss, leaves)

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph, captured = capture(step)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, wanted in zip(captured, step(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)

    @on_every_layer
    def test_a_training_step_of_a_model_can_be_captured(self, router, options):
        """Forward, backward and AdamW of a whole model: the replay of a graph equals the step."""
        images, labels = torch.randn(4, 3, 32, 32, device="cuda"), torch.tensor([0, 1, 2, 3], device="cuda")
        step, other = Step(router, options, "cuda"), Step(router, options, "cuda")
        step(images, labels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph, loss = capture(lambda: step(images, labels))
        other.load(step)
        images.copy_(torch.randn_like(images))
        graph.replay()
        torch.testing.assert_close(loss, other(images, labels), rtol=1e-4, atol=1e-5)
        step.assert_equals(other, rtol=1e-3, atol=1e-4)

    def test_every_replay_draws_new_noise(self):
        layer = make_layer("softmax_token_choice", {"top_k": 2, "noise_std": 1.0}, "cuda")
        x = torch.randn(4, 49, 16, device="cuda")
        graph, out = capture(lambda: layer(x).detach())
        graph.replay()
        first = out.clone()
        graph.replay()
        assert not torch.equal(out, first)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("tokens_dtype", [None, torch.float32])
    def test_a_soft_layer_under_autocast(self, dtype, tokens_dtype):
        """Mixes in autocast's dtype, also for float32 tokens, without synchronisation. Results are close to float32."""
        layer = make_layer("soft", {"slots_per_expert": 3}, "cuda")
        x = torch.randn(4, 49, 16, device="cuda", dtype=tokens_dtype or dtype, requires_grad=True)
        leaves = [x, *layer.parameters()]

        def step(enabled):
            with torch.autocast("cuda", dtype, enabled=enabled):
                out = layer(x if enabled else x.float())
            return out, *torch.autograd.grad(out.float().square().mean(), leaves)

        wanted = step(False)
        step(True)
        seen = Seen()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with seen:
                actual = step(True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert seen.dtypes["soft_mix"] == [(torch.float32, dtype)] * 2
        assert seen.dtypes["soft_mix_backward"] == [(dtype, torch.float32, dtype)] * 2
        assert seen.dtypes["soft_logits"] == [(x.dtype, torch.float32)]
        assert actual[0].dtype == dtype
        for ours, exact in zip(actual, wanted, strict=True):
            size = exact.abs().max().item()
            torch.testing.assert_close(ours.float() / size, exact.float() / size, rtol=0, atol=0.03)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_mixing_in_16_bits_can_be_captured(self, dtype):
        x, phi = torch.randn(2, 30, 16, device="cuda", dtype=dtype), torch.randn(16, 12, device="cuda")
        x, phi = x.requires_grad_(), phi.requires_grad_()

        def step():
            logits = ops.soft_logits(x, phi)
            out = ops.soft_mix(logits, ops.soft_mix(logits, x, 1, 4), 2)
            return out.detach(), *torch.autograd.grad(out.float().square().sum(), (x, phi))

        graph, captured = capture(step)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        for ours, wanted in zip(captured, step(), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.02)

    @on_every_layer
    def test_the_gradients_of_a_layer_repeat(self, router, options):
        layer = make_layer(router, {"noise_std": 0.0, **options}, "cuda")
        x = torch.randn(4, 49, 16, device="cuda", requires_grad=True)
        leaves = [x, *layer.parameters()]
        first = torch.autograd.grad(layer(x).square().sum(), leaves)
        for _ in range(5):
            for again, gradient in zip(torch.autograd.grad(layer(x).square().sum(), leaves), first, strict=True):
                assert torch.equal(again, gradient)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_the_device_of_the_tensors_is_used(self):
        x = torch.randn(3, 50, 20)
        values, indices = ops.topk(x.to("cuda:1"), 4, 1)  # while cuda:0 is current
        assert values.device == torch.device("cuda:1")
        assert torch.equal(indices.cpu(), ops.topk(x, 4, 1)[1])

    def test_runs_on_the_current_stream(self):
        x = torch.randn(8, 4096, 64, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # waits until x is computed
        with torch.cuda.stream(stream):
            values, _ = ops.topk(torch.cumsum(x.abs(), 1), 3, 1)
        stream.synchronize()
        assert torch.equal(values[..., 0], torch.cumsum(x.abs(), 1)[:, -1])
