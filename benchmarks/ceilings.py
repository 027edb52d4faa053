"""The machine's ceilings, measured in every run, and the floors of the cases under them."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.case import VIT_B, Floor, Size
from benchmarks.timer import Queued, once, repeats_for
from vmoe_routers import ops

GPU_MEMORY = 1 << 30  # bytes, of which its L2 holds next to nothing
GPU_PRODUCT = 8192  # one of 2048^3 does not fill it in bfloat16


@dataclass(frozen=True)
class Ceilings:
    """Rates: flop/s, bytes/s by level (read; copy counts both ways), exp/s. `sizes` are the working sets in bytes."""

    gemm: float
    gemm_layer: float
    read: dict[str, float]
    copy: dict[str, float]
    exp: float
    sizes: dict[str, int]
    gemm_bfloat16: float = 0.0  # of a GPU

    @property
    def fastest_gemm(self) -> float:
        """In float32."""
        return max(self.gemm, self.gemm_layer)

    def level(self, working_set: float) -> str:
        """The smallest level that holds the working set: a level counts for twice the size that was measured in it."""
        return next((name for name, size in self.sizes.items() if working_set <= 2 * size), list(self.sizes)[-1])

    def seconds(self, floor: Floor) -> dict[str, float]:
        """What each resource alone would take; the floor is the largest."""
        level = self.level(floor.bytes)
        gemm = self.gemm_bfloat16 if floor.dtype == "bfloat16" and self.gemm_bfloat16 else self.fastest_gemm
        return {
            "gemm": floor.flops / gemm,
            f"{level} bandwidth": floor.bytes / max(self.read[level], self.copy[level]),
            "exp": floor.exps / self.exp,
        }

    def at_least(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, rate by rate: a slower one was disturbed by other processes."""

        def levels(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {level: max(a[level], b[level]) for level in a}

        return Ceilings(
            max(self.gemm, other.gemm),
            max(self.gemm_layer, other.gemm_layer),
            levels(self.read, other.read),
            levels(self.copy, other.copy),
            max(self.exp, other.exp),
            self.sizes,
            max(self.gemm_bfloat16, other.gemm_bfloat16),
        )

    def floor(self, floor: Floor) -> dict:
        """The floor as results keep it: seconds, what sets them, and what was counted."""
        by_resource = self.seconds(floor)
        by = max(by_resource, key=lambda name: by_resource[name])
        return {"seconds": by_resource[by], "by": by, **asdict(floor)}

    def as_dict(self) -> dict:
        return asdict(self)


def cache_sizes() -> dict[str, int]:
    """Bytes of L2 and L3, of the first core; common sizes where the system does not say."""
    sizes = {"L2": 1 << 20, "L3": 32 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((index / name).read_text().strip() for name in ("level", "type"))
        if kind == "Unified" and f"L{level}" in sizes:
            text = (index / "size").read_text().strip()
            sizes[f"L{level}"] = int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
    return sizes


def measure_ceilings(device: str, *, quick: bool = False) -> Ceilings:
    """The best of several measurements each: a ceiling that noise lowers is none."""
    enough = 0.3 if quick else 1.0
    if device == "cuda":
        levels = {"L2": torch.cuda.get_device_properties().L2_cache_size // 2, "DRAM": GPU_MEMORY}
    else:
        cache = cache_sizes()
        levels = {"L2": cache["L2"] // 2, "L3": cache["L3"] // 2, "DRAM": min(4 * cache["L3"], 256 << 20)}

    def best(call) -> float:
        measured = Queued(call) if device == "cuda" else partial(once, call, repeats_for(call, device, 5e-3), device)
        start, times = time.perf_counter(), []
        while len(times) < 3 or time.perf_counter() - start < enough:
            times.append(measured())
        return min(times)

    def gemm(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> float:
        a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
        out = torch.empty(m, n, device=device, dtype=dtype)
        rate = 2 * m * k * n / best(lambda: torch.mm(a, b, out=out))
        if device == "cpu":
            # torch's product does not reach the peak of every CPU. Ours runs in soft_logits, which adds little to it.
            each = torch.randn(torch.get_num_threads(), m, k)
            rate = max(rate, 2 * each.numel() * n / best(lambda: ops.soft_logits(each, b)))
        return rate

    read, copy = {}, {}
    for name, nbytes in levels.items():
        x = torch.ones(nbytes // 4, device=device)
        # Whichever of torch's reductions reads fastest here.
        read[name] = nbytes / min(best(x.sum), best(x.amax), best(lambda x=x: torch.dot(x, x)))
        half = nbytes // 8
        source, target = x[:half], x[half : 2 * half]
        copy[name] = 8 * half / best(lambda source=source, target=target: target.copy_(source))
    x = torch.randn(levels["L2"] // 8, device=device)
    out = torch.empty_like(x)
    square = x[: x.numel() // 512 * 512].view(-1, 512)
    # torch's softmax has a faster exp than its exp, at times.
    exp = x.numel() / min(best(lambda: torch.exp(x, out=out)), best(lambda: torch.softmax(square, 1)))
    size = VIT_B if device == "cuda" else Size()
    rows = math.ceil(size.rows / size.experts)
    products = gemm(2048, 2048, 2048), gemm(rows, size.width, 4 * size.width)
    bfloat16 = gemm(*[GPU_PRODUCT] * 3, torch.bfloat16) if device == "cuda" else 0.0
    return Ceilings(*products, read, copy, exp, levels, bfloat16)
