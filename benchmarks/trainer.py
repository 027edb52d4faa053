"""Measures the time that the training loop adds to a step, and the growth of its memory.

    python -m benchmarks.trainer

A step of `vmoe_routers.training.Trainer` is compared with the bare step: forward, cross-entropy and auxiliary loss,
backward, clipping by torch, fused AdamW. Both steps train equal models on the same batch, in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import vmoe_routers as vr
from vmoe_routers.machine import here_and_now
from vmoe_routers.models import vit_moe
from vmoe_routers.training import Optimisation, Trainer

ROUNDS = 30


def make_model() -> nn.Module:
    """Makes a ViT-MoE of width 192 for 32 x 32 pixels."""
    torch.manual_seed(0)
    return vit_moe(32, 4, 3, 10, 192, 4, 3, router="softmax_token_choice", num_experts=8, group_size=8).train()


def bare_step(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Makes the step as a user would write it by hand."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(model(images), labels)
        (loss + vr.aux_loss(model)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def resident_bytes() -> int:
    """Returns the resident memory of this process (Linux)."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def main() -> None:
    """Prints the overhead of the loop and the growth of its memory."""
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    steps = {"bare": bare_step(make_model()), "Trainer": Trainer(make_model(), Optimisation(), 10_000)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(ROUNDS + 3):
        for name, step in steps.items():
            start = time.perf_counter()
            step(images, labels)
            if turn >= 3:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
    print({name: f"{1e3 * value:.1f} ms" for name, value in medians.items()}, f"ratio {ratio:.3f}", here_and_now())

    trainer = Trainer(make_model(), Optimisation(ema=0.99), 1000)
    sizes = []
    for step in range(1000):
        trainer(images[:8], labels[:8])
        if step in (99, 999):
            sizes.append(resident_bytes())
    print(f"memory after 100 and 1,000 steps: {sizes[0] / 1e6:.1f} and {sizes[1] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
