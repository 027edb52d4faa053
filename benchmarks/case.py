"""Data classes of the benchmark: a case has a size and variants that compute the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

FORWARD = "forward"
RECORDED = "forward with a graph"  # a forward that records the graph for backward
BACKWARD = "forward + backward"
OURS = "ours"

# "ours": this package. "naive": the first code that a user would write. "index": well-written torch code. "compiled":
# torch.compile of the first variant with the role "index". "peer": an installed package. "dense": the dense MLP of the
# same FLOPs. "yardstick": torch.add or a dense MLP. The call overhead of this package is compared with the call time of
# the yardstick.
ROLES = ("ours", "naive", "index", "compiled", "peer", "dense", "yardstick")


@dataclass(frozen=True)
class Size:
    """Sizes of a case.

    Attributes:
        images: Number of images.
        tokens: T, the tokens of one image.
        experts: E.
        width: D.
        top_k: K, the experts per token.
        dtype: Dtype of tokens and logits.
    """

    images: int = 64
    tokens: int = 196
    experts: int = 32
    width: int = 384
    top_k: int = 2
    dtype: str = "float32"

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return self.torch_dtype.itemsize

    def tolerance(self, of_float32: float) -> float:
        """Returns the tolerance of results: `of_float32` for float32, otherwise ten rounding errors of bfloat16.

        Variants round to 16 bits at different steps of the computation.
        """
        return of_float32 if self.dtype == "float32" else 10 * torch.finfo(torch.bfloat16).eps / 2

    def __str__(self) -> str:
        form = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"n={self.rows} T={self.tokens} E={self.experts} D={self.width} K={self.top_k}{form}"


VIT_B = Size(images=256, width=768, top_k=1)  # a batch that fills a GPU
VIT_B_BFLOAT16 = replace(VIT_B, dtype="bfloat16")


@dataclass(frozen=True)
class Floor:
    """Lower bound of the work of a case.

    Attributes:
        flops: Floating-point operations; a multiply-add counts as 2.
        bytes: Bytes moved to and from memory.
        exps: Exponentials.
        dtype: Dtype of the matrix products.
    """

    flops: float = 0
    bytes: float = 0
    exps: float = 0
    dtype: str = "float32"

    def __add__(self, other: Floor) -> Floor:
        return replace(
            self, flops=self.flops + other.flops, bytes=self.bytes + other.bytes, exps=self.exps + other.exps
        )


@dataclass(frozen=True)
class Variant:
    """One way to compute the case.

    Attributes:
        name: Name in tables.
        role: One of `ROLES`.
        call: Computes the outputs; outputs with a gradient come first.
        leaves: Tensors whose gradients are computed; empty for a variant without gradients.
        canonical: Brings the outputs into the layout of our outputs.
        canonical_gradients: Brings the gradients into the layout of our gradients.
        different: Reason why the variant computes a different function. If empty, the results must equal ours.
        different_gradient: Reason why only the gradients differ. If empty, the gradients must equal ours.
    """

    name: str
    role: str
    call: Callable[[], Sequence[Tensor]]
    leaves: Sequence[Tensor] = ()
    canonical: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
    canonical_gradients: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list
    different: str = ""
    different_gradient: str = ""


@dataclass(frozen=True)
class Case:
    """Variants of one op at one size.

    Attributes:
        op: Name of the op.
        title: Name in tables.
        size: Sizes of the inputs.
        variants: The variants; the first is ours.
        floors: Lower bound of the work, per direction.
        tolerance: Largest difference between results, relative to the largest entry of our result.
        allowed: Share of the entries that may differ by more than `tolerance`. The share is above 0 only if the
            function chooses between nearly equal values.
        skipped: Lines "name: reason" for variants that are not measured.
    """

    op: str
    title: str
    size: Size
    variants: Sequence[Variant]
    floors: dict[str, Floor]
    tolerance: float = 1e-5
    allowed: float = 0.0
    skipped: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class Entry:
    """Recipe of a case.

    Attributes:
        op: Name of the op.
        build: Builds the case from a size and a device.
        default: Size on a CPU.
        quick: Size of a quick run on a CPU.
        sweep: Attributes of the size that `--sweep` changes.
        weight: Relative duration of the case, for the estimate of the time left.
        cuda: Sizes on a GPU.
        cuda_quick: Sizes of a quick run on a GPU: the sizes that have targets.
        only_cuda: Leaves the case out on a CPU.
    """

    op: str
    build: Callable[[Size, str], Case]
    default: Size = Size()
    quick: Size = Size(images=16)
    sweep: Sequence[str] = ()
    weight: float = 1.0
    cuda: Sequence[Size] = (VIT_B,)
    cuda_quick: Sequence[Size] = ()
    only_cuda: bool = False
