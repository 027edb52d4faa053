"""What is measured: a case is data, made of variants that compute the same thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

FORWARD = "forward"
RECORDED = "forward with a graph"  # what a call costs when its gradient may be asked for later
BACKWARD = "forward + backward"
OURS = "ours"

# "ours"; "naive": what a user writes first; "index": well-written torch; "compiled": torch.compile of that;
# "peer": an installed package; "dense": the dense MLP of the same FLOPs; "yardstick": torch.add beside a tiny call.
ROLES = ("ours", "naive", "index", "compiled", "peer", "dense", "yardstick")


@dataclass(frozen=True)
class Size:
    """T tokens in each of `images` images, E experts, width D, K experts a token; `dtype` of tokens and logits."""

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
        """How far results may be apart: in 16 bits by ten roundings of bfloat16, which forms have at other places."""
        return of_float32 if self.dtype == "float32" else 10 * torch.finfo(torch.bfloat16).eps / 2

    def __str__(self) -> str:
        form = "" if self.dtype == "float32" else f" {self.dtype}"
        return f"n={self.rows} T={self.tokens} E={self.experts} D={self.width} K={self.top_k}{form}"


VIT_B = Size(images=256, width=768, top_k=1)  # a batch that fills a GPU
VIT_B_BFLOAT16 = replace(VIT_B, dtype="bfloat16")


@dataclass(frozen=True)
class Floor:
    """The least that the case has to do: multiply-adds as 2 flops, bytes moved to and from memory, exponentials.

    `dtype` is what the products are of.
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

    `call` gives the outputs, those with a gradient first. `leaves` are what the gradient is taken of; `canonical`
    and `canonical_gradients` bring results into the shape of ours. `different` says why it is another function, or
    nothing: then its results are asserted equal to ours. `different_gradient` says so of the gradients alone.
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
    """Variants of one op at one size; the first is ours.

    `allowed` is the share of an output's entries that may differ by more than `tolerance` (of its largest entry):
    where a choice between nearly equal values is part of the function, and nowhere else.
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
    """A case to be built: `build(size, device)`.

    `sweep` names the parts of the size that are worth changing; `weight` is about how long the case takes beside the
    others, for the time left. A GPU has sizes of its own, `cuda`, and of a quick run `cuda_quick`, those that targets
    are for; an entry with `only_cuda` is not measured on a CPU.
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
