"""Ceilings, the highest rates of the machine, and floors, the least times of the cases at these rates.

Every run measures the ceilings.
"""

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

GPU_MEMORY = 1 << 30  # bytes: far more than L2 holds
GPU_PRODUCT = 8192  # rows and columns; 2048 do not fill a GPU in bfloat16


@dataclass(frozen=True)
class Ceilings:
    """Highest measured rates.

    Attributes:
        gemm: flop/s of a large float32 product.
        gemm_layer: flop/s of a float32 product with the shape of a layer.
        read: Bytes/s of reading, per memory level.
        copy: Bytes/s of copying, per memory level; counts bytes read and bytes written.
        exp: Exponentials/s.
        sizes: Bytes of the working set that was measured, per memory level.
        gemm_bfloat16: flop/s of a large bfloat16 product on a GPU; 0 on a CPU.
    """

    gemm: float
    gemm_layer: float
    read: dict[str, float]
    copy: dict[str, float]
    exp: float
    sizes: dict[str, int]
    gemm_bfloat16: float = 0.0

    @property
    def fastest_gemm(self) -> float:
        """The higher of the two float32 rates."""
        return max(self.gemm, self.gemm_layer)

    def level(self, working_set: float) -> str:
        """Returns the smallest level that holds the working set.

        A level holds working sets of up to twice the size of the working set with which its rates were measured.
        """
        return next((name for name, size in self.sizes.items() if working_set <= 2 * size), list(self.sizes)[-1])

    def seconds(self, floor: Floor) -> dict[str, float]:
        """Returns the seconds that each resource alone would take. The largest number is the floor."""
        level = self.level(floor.bytes)
        gemm = self.gemm_bfloat16 if floor.dtype == "bfloat16" and self.gemm_bfloat16 else self.fastest_gemm
        return {
            "gemm": floor.flops / gemm,
            f"{level} bandwidth": floor.bytes / max(self.read[level], self.copy[level]),
            "exp": floor.exps / self.exp,
        }

    def at_least(self, other: Ceilings) -> Ceilings:
        """Returns the higher of two measurements of every rate: other processes slowed the lower measurement."""

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
        """Returns the floor as the entry of a result: seconds, the slowest resource, and the counts of `floor`."""
        by_resource = self.seconds(floor)
        by = max(by_resource, key=lambda name: by_resource[name])
        return {"seconds": by_resource[by], "by": by, **asdict(floor)}

    def as_dict(self) -> dict:
        return asdict(self)


def cache_sizes() -> dict[str, int]:
    """Returns the bytes of L2 and L3 of the first core; common sizes if the system does not report them."""
    sizes = {"L2": 1 << 20, "L3": 32 << 20}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = ((index / name).read_text().strip() for name in ("level", "type"))
        if kind == "Unified" and f"L{level}" in sizes:
            text = (index / "size").read_text().strip()
            sizes[f"L{level}"] = int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]]
    return sizes


def measure_ceilings(device: str, *, quick: bool = False) -> Ceilings:
    """Measures every rate several times and keeps the highest."""
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
            # torch's product does not reach the peak of every CPU. soft_logits calls our product and adds little work.
            each = torch.randn(torch.get_num_threads(), m, k)
            rate = max(rate, 2 * each.numel() * n / best(lambda: ops.soft_logits(each, b)))
        return rate

    read, copy = {}, {}
    for name, nbytes in levels.items():
        x = torch.ones(nbytes // 4, device=device)
        # Take the reduction of torch that reads fastest on this machine.
        read[name] = nbytes / min(best(x.sum), best(x.amax), best(lambda x=x: torch.dot(x, x)))
        half = nbytes // 8
        source, target = x[:half], x[half : 2 * half]
        copy[name] = 8 * half / best(lambda source=source, target=target: target.copy_(source))
    x = torch.randn(levels["L2"] // 8, device=device)
    out = torch.empty_like(x)
    square = x[: x.numel() // 512 * 512].view(-1, 512)
    # The exponential within torch's softmax is sometimes faster than torch.exp.
    exp = x.numel() / min(best(lambda: torch.exp(x, out=out)), best(lambda: torch.softmax(square, 1)))
    size = VIT_B if device == "cuda" else Size()
    rows = math.ceil(size.rows / size.experts)
    products = gemm(2048, 2048, 2048), gemm(rows, size.width, 4 * size.width)
    bfloat16 = gemm(*[GPU_PRODUCT] * 3, torch.bfloat16) if device == "cuda" else 0.0
    return Ceilings(*products, read, copy, exp, levels, bfloat16)
