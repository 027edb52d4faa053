"""What the machine can do at most, measured anew in every run, and the floors of the cases under it."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.case import Floor, Size
from benchmarks.timer import once, repeats_for
from vmoe_routers import ops


@dataclass(frozen=True)
class Ceilings:
    """Rates: flop/s, bytes/s by level (read; copy counts both ways), exp/s. `sizes` are the working sets in bytes."""

    gemm: float
    gemm_layer: float
    read: dict[str, float]
    copy: dict[str, float]
    exp: float
    sizes: dict[str, int]

    def level(self, working_set: float) -> str:
        """The smallest level that holds the working set: twice what was measured there."""
        return next((name for name, size in self.sizes.items() if working_set <= 2 * size), list(self.sizes)[-1])

    def seconds(self, floor: Floor) -> dict[str, float]:
        """What each resource alone would take; the floor is the largest."""
        level = self.level(floor.bytes)
        return {
            "gemm": floor.flops / max(self.gemm, self.gemm_layer),
            f"{level} bandwidth": floor.bytes / max(self.read[level], self.copy[level]),
            "exp": floor.exps / self.exp,
        }

    def at_least(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements, rate by rate: what slows a ceiling down is somebody else."""

        def levels(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
            return {level: max(a[level], b[level]) for level in a}

        return Ceilings(
            max(self.gemm, other.gemm),
            max(self.gemm_layer, other.gemm_layer),
            levels(self.read, other.read),
            levels(self.copy, other.copy),
            max(self.exp, other.exp),
            self.sizes,
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


def measure_ceilings(device: str, size: Size, *, quick: bool = False) -> Ceilings:
    """The best of several measurements each: a ceiling that noise lowers is none."""
    enough = 0.3 if quick else 1.0
    cache = cache_sizes()
    if device == "cuda":
        cache = dict.fromkeys(cache, torch.cuda.get_device_properties().L2_cache_size)
    levels = {"L2": cache["L2"] // 2, "L3": cache["L3"] // 2, "DRAM": min(4 * cache["L3"], 256 << 20)}

    def best(call) -> float:
        repeats = repeats_for(call, device, 5e-3)
        start, times = time.perf_counter(), []
        while len(times) < 3 or time.perf_counter() - start < enough:
            times.append(once(call, repeats, device))
        return min(times)

    def gemm(m: int, k: int, n: int) -> float:
        a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
        out = torch.empty(m, n, device=device)
        rate = 2 * m * k * n / best(lambda: torch.mm(a, b, out=out))
        if device == "cpu":
            # torch's product does not use all of every CPU. Ours is a thread's; soft_logits has little else to do.
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
    rows = max(1, math.ceil(size.rows / size.experts))
    return Ceilings(gemm(2048, 2048, 2048), gemm(rows, size.width, 4 * size.width), read, copy, exp, levels)
