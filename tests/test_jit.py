"""torch.jit.trace: a traced layer is right for every batch with its number of tokens, and refuses other numbers."""

import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers.models import vit_moe

pytestmark = pytest.mark.filterwarnings("ignore")  # sizes become constants, and TorchScript is deprecated


class HashRouter(nn.Module):
    """Sends tokens to experts by position, like examples/own_router.py, with gates that depend on the tokens."""

    def __init__(self, dim, num_experts):
        super().__init__()
        self.dim, self.num_experts = dim, num_experts

    def forward(self, x, mask=None):
        expert = torch.arange(x.shape[1], device=x.device) % self.num_experts
        gates = torch.nn.functional.one_hot(expert, self.num_experts).to(x.dtype) * x[..., :1]
        return vr.token_choice(gates, top_k=1, capacity=vr.capacity(x.shape[1], self.num_experts, 1.0), mask=mask)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize("router", [*vr.ROUTERS, HashRouter])
def test_trace(router, group_size):
    layer = vr.MoEMlp(8, 12, num_experts=4, router=router, group_size=group_size).eval()
    traced = torch.jit.trace(layer, torch.randn(2, 6, 8))
    for batch in (2, 4):
        x = torch.randn(batch, 6, 8, requires_grad=True)
        torch.testing.assert_close(traced(x), layer(x))
        wanted = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        torch.testing.assert_close(torch.autograd.grad(traced(x).square().sum(), [x, *traced.parameters()]), wanted)
    for shape in [(2, 12, 8), (4, 3, 8)]:
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            traced(torch.randn(shape))


def test_trained_after_a_trace_without_gradients():
    layer = vr.MoEMlp(8, 12, num_experts=4, router="soft").eval()
    x = torch.randn(2, 6, 8)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x)
    wanted = torch.autograd.grad(layer(x).sum(), list(layer.parameters()))
    torch.testing.assert_close(torch.autograd.grad(traced(x).sum(), list(traced.parameters())), wanted)


def test_refuses_auxiliary_losses():
    layer = vr.MoEMlp(8, 12, num_experts=4, router="softmax_token_choice", noise_std=0.0)
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace keeps no auxiliary loss: call eval\(\)"):
        torch.jit.trace(layer, torch.randn(2, 6, 8))


def model():
    return vit_moe(8, 2, 1, 5, embed_dim=16, depth=2, num_heads=2, num_experts=3, router="softmax_expert_choice")


def test_a_whole_model_with_a_mask():
    made = model().eval()
    nn.init.normal_(made.head.weight)
    inputs = {"x": torch.randn(2, 1, 8, 8), "mask": torch.rand(2, 16) > 0.3}
    traced = torch.jit.trace(made, example_kwarg_inputs=inputs)
    for masked in (inputs["mask"], torch.rand(2, 16) > 0.6):
        torch.testing.assert_close(traced(x=inputs["x"], mask=masked), made(inputs["x"], mask=masked))


def test_graph_of_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        writer.add_graph(model(), torch.randn(2, 1, 8, 8))
    (file,) = tmp_path.iterdir()
    assert b"grouped_mlp" in file.read_bytes()


def test_flops_of_fvcore():
    fvcore = pytest.importorskip("fvcore.nn")
    counted = fvcore.FlopCountAnalysis(model().eval(), torch.randn(1, 1, 8, 8))
    counted.unsupported_ops_warnings(False)
    dense = vit_moe(8, 2, 1, 5, embed_dim=16, depth=2, num_heads=2, router=None, moe_blocks=[1]).eval()
    trunk = fvcore.FlopCountAnalysis(dense, torch.randn(1, 1, 8, 8)).by_module()
    assert counted.by_module()["blocks.0"] == trunk["blocks.0"]
    assert counted.unsupported_ops()["vmoe_routers::grouped_mlp"] == 1
