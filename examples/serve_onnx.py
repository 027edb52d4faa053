"""ONNX: exports a model with a dynamic batch, and serves it with onnxruntime, without torch's kernels.

python examples/serve_onnx.py
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch

from vmoe_routers.decompositions import DECOMPOSITIONS
from vmoe_routers.models import vit_moe


def export(model: torch.nn.Module, images: torch.Tensor, path: Path) -> None:
    """Writes the model, in eval mode, for any number of images."""
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model.eval(), (images,), dynamic_shapes={"x": {0: batch}})
    program = program.run_decompositions(DECOMPOSITIONS)  # replaces our ops by plain PyTorch
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)


if __name__ == "__main__":
    model = vit_moe(8, 2, 1, 10, embed_dim=32, depth=1, num_heads=2, router="soft", num_experts=4)
    torch.nn.init.normal_(model.head.weight)  # in practice, load a model by vmoe_routers.checkpoints.from_pretrained
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export(model, torch.randn(4, 1, 8, 8), path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(7, 1, 8, 8)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        difference = (torch.from_numpy(logits) - model(images)).abs().max().item()
    print(f"{len(logits)} images served, logits differ by {difference:.1e}")
