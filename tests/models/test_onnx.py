"""Models of every router through ONNX: exported, decomposed, and run by onnxruntime on batches of several sizes."""

import numpy as np
import pytest
import torch
from torch import nn

import vmoe_routers as vr
from vmoe_routers.decompositions import DECOMPOSITIONS
from vmoe_routers.models import vit_moe

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

# Some options are not defaults. The iterations are few, because they are unrolled and take time to export.
OPTIONS = {
    "softmax_token_choice": {"top_k": 2, "batch_priority": True, "capacity_factor": 0.6},
    "sinkhorn_token_choice": {"iterations": 2, "renormalize": True},
    "softmax_expert_choice": {"capacity_factor": 0.5},
    "sinkhorn_expert_choice": {"iterations": 2, "combine": "plan", "tolerance": 0.05},
    "sparsity_constrained_expert_choice": {"iterations": 2},
    "soft": {"group_size": 1},
}


def model_of(router):
    options = {"group_size": 2, **OPTIONS[router]}
    model = vit_moe(
        8, 2, 1, 10, embed_dim=16, depth=1, num_heads=2, mlp_ratio=2.0, router=router, num_experts=4, **options
    )
    nn.init.normal_(model.head.weight)
    return model.eval()


class EachRouter(nn.Module):
    """Puts all models into one module, because every export has a fixed cost."""

    def __init__(self):
        super().__init__()
        self.models = nn.ModuleDict({router: model_of(router) for router in vr.ROUTERS})

    def forward(self, x):
        return tuple(model(x) for model in self.models.values())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The models, their decomposed program, and onnxruntime's session."""
    torch.manual_seed(0)
    model = EachRouter()
    shapes = {"x": {0: 2 * torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(model, (torch.randn(4, 1, 8, 8),), dynamic_shapes=shapes)
    program = program.run_decompositions(DECOMPOSITIONS)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    torch.onnx.export(program, dynamo=True, optimize=False, verbose=False).save(path)  # optimizing takes ten seconds
    return model, program.module(), onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


# This is one test, because two processes that divide parametrized tests would both export.
def test_computes_what_the_models_do(exported):
    model, program, session = exported
    (name,) = (argument.name for argument in session.get_inputs())
    for images in (4, 10):
        x = torch.randn(images, 1, 8, 8)
        x[1] = x[0]  # ties between images that are routed together
        with torch.no_grad():
            wanted, decomposed = model(x), program(x)
        found = session.run(None, {name: x.numpy()})
        for router, w, d, f in zip(vr.ROUTERS, wanted, decomposed, found, strict=True):
            np.testing.assert_allclose(d, w, rtol=1e-4, atol=1e-5, err_msg=f"{router}, {images} images")
            np.testing.assert_allclose(f, w, rtol=1e-4, atol=1e-5, err_msg=f"{router}, {images} images")
