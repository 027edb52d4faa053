"""Measures the throughput of a model in images per second."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from vmoe_routers.machine import cpu_model
from vmoe_routers.training.evaluation import eval_mode

WARM_UP, REPEATS = 3, 10


@dataclass(frozen=True)
class Throughput:
    """Times of forwards in eval mode.

    Attributes:
        images_per_second: batch_size over the median of the times.
        milliseconds: the times of the forwards, sorted.
        batch_size: images per forward.
        image_shape: channels, height and width.
        device: name of the GPU, or name of the CPU with the number of threads.
        dtype: the dtype of parameters and images.
    """

    images_per_second: float
    milliseconds: list[float]
    batch_size: int
    image_shape: tuple[int, int, int]
    device: str
    dtype: str


@torch.no_grad()
def measure_throughput(
    model: nn.Module, image_shape: tuple[int, int, int], batch_size: int, repeats: int = REPEATS
) -> Throughput:
    """Times forwards of random images on the model's device, in its dtype, after three forwards as warm-up.

    Args:
        model: From images to logits. Its modules keep their modes.
        image_shape: Channels, height and width.
        batch_size: Images per forward.
        repeats: Number of timed forwards.
    """
    parameter = next(model.parameters())
    device = parameter.device
    images = torch.randn(batch_size, *image_shape, device=device, dtype=parameter.dtype)
    times = []
    with eval_mode(model):
        for _ in range(WARM_UP + repeats):
            start = time.perf_counter()
            model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
    times = sorted(times[WARM_UP:])
    name = f"{cpu_model()}, {torch.get_num_threads()} threads"
    return Throughput(
        images_per_second=batch_size / statistics.median(times),
        milliseconds=[1000 * seconds for seconds in times],
        batch_size=batch_size,
        image_shape=image_shape,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        dtype=str(parameter.dtype).removeprefix("torch."),
    )
