"""Measures the loader on JPEG files of 224 pixels: `python -m benchmarks.loader [--workers N] [--batch-size N]`.

Writes a folder of pictures. Prints images per second without a model, the share of time that training steps of a
ViT-Ti/16 wait for data, and images per second of opening shards.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console

from vmoe_routers.machine import cpu_model
from vmoe_routers.training import Augmentation, Batches, Transform, open_data, training_batches
from vmoe_routers.training.shards import Shards

SIZE = 224
CLASSES = 2
IMAGES = 256
MEMBERS = 5000


def write_pictures(folder: Path) -> int:
    """Writes JPEG files. Returns their mean size in bytes."""
    rng = np.random.default_rng(0)
    sizes = []
    for part, count in (("train", IMAGES), ("val", CLASSES)):
        for number in range(count):
            path = folder / part / str(number % CLASSES) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            # Coarse and fine noise compress to about as many bytes as a photograph.
            coarse = Image.fromarray(rng.integers(0, 256, (14, 14, 3), dtype=np.uint8)).resize((SIZE, SIZE))
            pixels = np.asarray(coarse, dtype=float) + rng.normal(0, 6, (SIZE, SIZE, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            sizes.append(path.stat().st_size)
    return sum(sizes) // len(sizes)


def indexed(path: Path) -> float:
    """Returns images per second of opening a shard, which reads the headers of all members."""
    with tarfile.open(path, "w") as tar:
        for number in range(MEMBERS):
            for name, raw in ((f"{number:06}.jpg", bytes(2000)), (f"{number:06}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    start = time.perf_counter()
    return len(Shards([path])) / (time.perf_counter() - start)


def alone(batches: Batches, steps: int) -> float:
    """Returns images per second of the loader without a model, after four batches."""
    for _ in range(4):
        next(batches)
    start = time.perf_counter()
    count = sum(len(next(batches).labels) for _ in range(steps))
    return count / (time.perf_counter() - start)


def trained(batches: Batches, device: torch.device) -> tuple[float, float]:
    """Returns milliseconds per training step of a ViT-Ti/16, and the share of time that a step waits for data."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    steps = len(batches) - 1
    for images, labels, _ in batches:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 1000 * batches.elapsed / steps, batches.waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{cpu_model()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        size = write_pictures(Path(folder))
        data = open_data(folder)
        console.print(
            f"{IMAGES} JPEG files of {SIZE} x {SIZE} pixels, {size / 1000:.0f} kB each, {options.workers} workers"
        )
        console.print(f"opening shards of {MEMBERS} images: {indexed(Path(folder) / 'train.tar'):.0f} images/s")
        augmentations = {
            "random crop and flip": Augmentation(),
            "with RandAugment and random erasing": Augmentation(rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25),
        }
        for name, augmentation in augmentations.items():

            def batches(steps: int, device: str, augmentation: Augmentation = augmentation) -> Batches:
                transform = Transform(augmentation, training=True)
                size, workers = options.batch_size, options.workers
                return training_batches(
                    data.train, transform, batch_size=size, steps=steps, seed=0, workers=workers, device=device
                )

            with batches(options.steps + 4, "cpu") as found:
                rate = alone(found, options.steps)
            with batches(options.steps, options.device) as found:
                step, waiting = trained(found, torch.device(options.device))
            console.print(
                f"{name}: {rate:.0f} images/s alone; ViT-Ti/16 on {options.device}: {step:.0f} ms per step of "
                f"{options.batch_size} images, {waiting:.1%} of it waiting for data"
            )


if __name__ == "__main__":
    main()
