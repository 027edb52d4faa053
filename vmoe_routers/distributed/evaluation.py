"""Evaluation on many ranks: every image counts once, and every rank runs the same number of batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


def padded_batches(images: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Divides the images 0 .. images - 1 among the ranks, in batches of equal sizes on all ranks.

    Under FSDP2 and expert parallelism every rank must run the model equally often, with equal shapes. So
    the last image is repeated on a rank that has too few images. Without a process group this rank has all images.

    With ``group_size=1`` the logits do not depend on the number of ranks. With larger groups they do, because the
    number of ranks decides which images share a group.

    Args:
        images: Number of images, at least 1.
        batch_size: Images of a batch on each rank. The last batch may be smaller.

    Yields:
        The indices [N] int64 of a batch, and [N] bool: True = count this image, False = it is a repetition.
    """
    for name, value in (("images", images), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"padded_batches: {name} must be an int of at least 1, got {value!r}")
    grouped = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    share = -(-images // world)
    for indices in torch.arange(rank * share, (rank + 1) * share).split(batch_size):
        yield indices.clamp(max=images - 1), indices < images
