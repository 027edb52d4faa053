"""Computes the cost of whole models on a GPU: the table "Whole models" of docs/cuda.md.

    python scripts/cuda_model_cost.py

Nothing is measured and no GPU is needed. The script runs the models on fake tensors, which have shapes and no memory,
and lists the ops of a forward and a backward pass. Every launch of an op takes the largest of three times: its bytes
over the bandwidth, its operations over the rate, and LAUNCH. The models have bfloat16 parameters; the backward pass
includes the auxiliary losses and no optimizer.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import timm.layers.mlp
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vmoe_routers as vr
from vmoe_routers import models
from vmoe_routers.ops import _dtypes

PAGE = Path(__file__).parents[1] / "docs" / "cuda.md"
MARKS = "<!-- models: written by scripts/cuda_model_cost.py -->", "<!-- end of models -->"

# An H200: the assumed rates of docs/cuda.md.
BANDWIDTH = 4.3e12  # bytes per second
HALF, SINGLE = 700e12, 50e12  # operations per second of products in 16 bits and in float32
ATTENTION = 350e12  # operations per second of attention kernels in 16 bits
LAUNCH = 2.5e-6  # the least time of a kernel in a CUDA graph, in seconds

BATCH, EXPERTS = 256, 32
VIT_B: dict[str, Any] = {"img_size": 224, "patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12}
ROUTERS: dict[str, dict[str, Any]] = {
    name: {"capacity_factor": 1.0} if name == "soft" else {"top_k": 1} if name.endswith("token_choice") else {}
    for name in vr.ROUTERS
}


class Launch(NamedTuple):
    """The work of one kernel, or the seconds that docs/cuda.md estimates for the kernel."""

    bytes: float = 0.0
    flops: float = 0.0
    rate: float = HALF
    estimate: float = 0.0

    @property
    def seconds(self) -> float:
        """The predicted time."""
        return max(self.bytes / BANDWIDTH, self.flops / self.rate, self.estimate, LAUNCH)


def size(*tensors: object) -> float:
    """Adds up the bytes of tensors."""
    return float(sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)))


def product(batch: int, n: int, k: int, m: int, rate: float = HALF, width: int = 2) -> Launch:
    """A batch of products [n, k] x [k, m]."""
    return Launch(width * batch * (n * k + k * m + n * m), 2.0 * batch * n * k * m, rate)


def _experts(x: torch.Tensor, w1: torch.Tensor, *_: object) -> Iterator[Launch]:
    (e, n, d), f = x.shape, w1.shape[2]
    yield product(e, n, d, f)
    yield Launch(4.0 * e * n * f)  # bias and GELU
    yield product(e, n, f, d)
    yield Launch(4.0 * e * n * d)  # bias


def _experts_backward(grad: torch.Tensor, x: torch.Tensor, w1: torch.Tensor, *_: object) -> Iterator[Launch]:
    (e, n, d), f = x.shape, w1.shape[2]
    yield Launch(4.0 * e * n * d)  # grad of the second bias
    yield product(e, n, d, f)
    yield Launch(8.0 * e * n * f)  # GELU and its gradient, grad of the first bias
    yield from (Launch(), Launch())  # the second steps of both sums
    yield from (product(e, d, n, f), product(e, f, n, d), product(e, n, f, d))


def _soft_logits(x: torch.Tensor, phi: torch.Tensor) -> Iterator[Launch]:
    rows, (d, s) = x.numel() // x.shape[-1], phi.shape
    yield Launch(size(phi) * 2)  # phi in two parts
    yield Launch(size(x) + 8.0 * rows * s, 4.0 * rows * d * s)
    yield Launch(size(x) + 12.0 * rows * s)  # norms, and the sum of both parts


def _soft_logits_backward(grad: torch.Tensor, x: torch.Tensor, phi: torch.Tensor) -> Iterator[Launch]:
    rows, (d, s) = x.numel() // x.shape[-1], phi.shape
    yield Launch(size(x, grad) + 2.0 * rows * s)
    yield Launch(size(phi) * 2)
    yield from (product(1, d, rows, s), product(1, rows, s, d))
    yield Launch(3 * size(x))


def _soft_mix(logits: torch.Tensor, values: torch.Tensor, *_: object) -> Iterator[Launch]:
    d = values.shape[-1]
    yield Launch(size(logits, values) + 2.0 * logits.numel() * d / min(logits.shape[1:]), 2.0 * logits.numel() * d)


def _soft_mix_backward(grad: torch.Tensor, logits: torch.Tensor, values: torch.Tensor, *_: object) -> Iterator[Launch]:
    flops = 2.0 * logits.numel() * values.shape[-1]
    yield from (Launch(2 * size(values)), Launch(size(grad, values, logits), flops))  # slots to rows
    yield Launch(3 * size(logits))  # softmax and its gradient
    yield from (Launch(size(grad, values) + size(logits) / 2, flops), Launch(2 * size(values)))


def _estimated(seconds: float) -> Callable[..., Iterator[Launch]]:
    def launches(x: torch.Tensor, *_: object) -> Iterator[Launch]:
        yield Launch(3 * size(x), estimate=seconds)

    return launches


# The kernels of ops that take several launches, or whose seconds docs/cuda.md estimates for groups of one image. Every
# other op is one launch, which reads the arguments and writes the results.
OURS: dict[str, Callable[..., Iterator[Launch]]] = {
    "grouped_mlp": _experts,
    "grouped_mlp_backward": _experts_backward,
    "soft_logits": _soft_logits,
    "soft_logits_backward": _soft_logits_backward,
    "soft_mix": _soft_mix,
    "soft_mix_backward": _soft_mix_backward,
    "sinkhorn": _estimated(24e-6),
    "sinkhorn_backward": _estimated(60e-6),
    "ksparse_transport": _estimated(200e-6),
}


def launches(func: Any, args: tuple, out: Any) -> Iterator[Launch]:
    """Lists the kernels of one call of an op."""
    name, tensors = func.overloadpacket.__name__, [a for a in args if isinstance(a, torch.Tensor)]
    outs = out if isinstance(out, (tuple, list)) else (out,)
    if func.namespace == "prim" or name == "detach" or func.is_view or name in ("_unsafe_view", "promote_types"):
        return
    if func.namespace == "vmoe_routers" and name in OURS:
        yield from OURS[name](*args)
    elif name in ("mm", "addmm", "bmm", "baddbmm"):
        left, right = tensors[-2:]
        rate = HALF if left.element_size() == 2 else SINGLE
        yield Launch(size(left, right, out), 2.0 * left.numel() * right.shape[-1], rate)
    elif "scaled_dot_product" in name:
        backward = "backward" in name
        q = tensors[1 if backward else 0]
        flops = (10.0 if backward else 4.0) * q.numel() * q.shape[2]
        yield Launch(size(*tensors, *outs), flops, ATTENTION)
    elif name == "convolution":  # the patch embedding
        yield Launch(size(*tensors, *outs), 2.0 * outs[0].numel() * math.prod(tensors[1].shape[1:]))
    elif name == "convolution_backward":
        yield Launch(size(*tensors, *outs), 2.0 * tensors[0].numel() * math.prod(tensors[2].shape[1:]))
    else:
        yield Launch(size(*tensors, *outs))


class Listed(TorchDispatchMode):
    """Lists the launches of the ops that run in this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Runs an op and lists it."""
        out = func(*args, **(kwargs or {}))
        self.launches.extend(launches(func, args, out))
        return out


def trace(make: Callable[[], torch.nn.Module], *shape: int, train: bool) -> list[Launch]:
    """Lists the launches of one pass of a model over an input, forward or forward and backward."""
    with torch.device("meta"):
        model = make().train(train)
    with FakeTensorMode():
        parameters = {
            name: torch.empty(p.shape, dtype=torch.bfloat16, requires_grad=train)
            for name, p in model.named_parameters()
        }
        x = torch.empty(shape, dtype=torch.bfloat16)
        with Listed() as listed, torch.set_grad_enabled(train):
            out = torch.func.functional_call(model, parameters, x)
            if train:
                (out.sum() + vr.aux_loss(model)).backward()
    return listed.launches


def table(batch: int = BATCH, **vit: int) -> str:
    """Makes the table in Markdown."""
    vit = {**VIT_B, **vit}
    _dtypes.HALF_PRODUCTS = frozenset({"cpu", "cuda"})  # fake CPU tensors take the path of CUDA tensors
    image = batch, 3, vit["img_size"], vit["img_size"]
    patches = (vit["img_size"] // vit["patch_size"]) ** 2

    def model(router: str | None, options: dict[str, Any]) -> Callable[[], torch.nn.Module]:
        return lambda: models.vit_moe(**vit, router=router, num_experts=EXPERTS, **options)

    def layer(router: str | None, options: dict[str, Any]) -> Callable[[], torch.nn.Module]:
        more: dict[str, Any] = {"num_tokens": patches} if router == "soft" else {}
        width = vit["embed_dim"]
        if router is None:
            return lambda: timm.layers.mlp.Mlp(width, 4 * width)
        return lambda: vr.MoEMlp(width, 4 * width, num_experts=EXPERTS, router=router, **options, **more)

    lines = [
        "| router | inference: launches | GB | TFLOP | ms | / dense | training: launches | GB | TFLOP | ms | / dense |",
        "|---|" + "---:|" * 10,
    ]
    dense: dict[bool, float] = {}
    for router, options in [(None, {}), *ROUTERS.items()]:
        cells = [router or "dense ViT"]
        for train in (False, True):
            listed = trace(model(router, options), *image, train=train)
            count = len(trace(layer(router, options), batch, patches, vit["embed_dim"], train=train))
            seconds = sum(launch.seconds for launch in listed)
            dense.setdefault(train, seconds)
            gigabytes, teraflops = sum(x.bytes for x in listed) / 1e9, sum(x.flops for x in listed) / 1e12
            cells += [str(count), f"{gigabytes:.1f}", f"{teraflops:.1f}", f"{1e3 * seconds:.1f}"]
            cells.append(f"{seconds / dense[train]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Writes the table between its marks in the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write to")
    page = parser.parse_args().page
    before, rest = page.read_text().split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


if __name__ == "__main__":
    main()
