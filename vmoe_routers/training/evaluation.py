"""evaluate_model: accuracy, loss, calibration and routing metrics of a classifier."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_routers.inspect import RoutingStatistics

BINS = 15  # bins of the calibration error


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate_model`.

    Attributes:
        images: number of images.
        top1, top5: share of images whose class has the largest logit, and one of the five largest. Ties go to the lower
            class, and a class with the logit NaN is never right.
        loss: mean cross-entropy, of the softmax over the classes.
        calibration_error: expected calibration error: over 15 bins of equal width, the mean distance of the accuracy in
            the bin from the mean confidence, weighted by the images in the bin. The confidence of an image is its
            largest probability. A bin includes its upper end.
        images_per_second: images over the seconds of the whole evaluation, with reading the data and the metrics.
        classes: for every class: `images`, `top1`, `top5` and `loss` over the images of this class, `predicted` (the
            number of images with this prediction) and `precision` (the share of these predictions that are right). A
            value without images is None.
        layers: metrics of `RoutingStatistics.layers`, by the name of the MoE layer.
    """

    images: int
    top1: float
    top5: float
    loss: float
    calibration_error: float
    images_per_second: float
    classes: list[dict[str, Any]]
    layers: dict[str, dict[str, Any]]


@torch.no_grad()
def evaluate_model(model: nn.Module, batches: Iterable[Sequence[Tensor]], num_classes: int) -> Evaluation:
    """Evaluates a classifier in eval mode. Afterwards, every module has the mode that it had before.

    If torch.distributed is initialised, every process must call this function with its own batches, and gets the result
    over the images of all processes. No batch waits for the device.

    Args:
        model: From images to logits [N, num_classes], or to an output with the attribute `logits`.
        batches: Images [N, ...], labels [N] int64 and, optionally, valid [N] bool: False for images that do not count,
            such as padding. Images are moved to the device and the dtype of the model's first parameter.
        num_classes: Number of classes.

    Raises:
        ValueError: There is no image, the model has another number of classes, or a label is out of range.
    """
    parameter = next(model.parameters())
    sums = _Sums(num_classes, parameter.device)
    routing = RoutingStatistics(model, parameter.device)
    start = time.perf_counter()
    with eval_mode(model):
        for images, labels, *rest in batches:
            images = images.to(parameter.device, parameter.dtype, non_blocking=True)
            labels = labels.to(parameter.device, non_blocking=True)
            valid = rest[0] if rest else torch.ones_like(labels, dtype=torch.bool)
            valid = valid.to(parameter.device, non_blocking=True)
            with routing.recording(valid):
                output = model(images)
            sums.add(getattr(output, "logits", output), labels, valid)
    return _reduced(sums, routing, start)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets a model to eval mode within the context. Afterwards, every module has the mode that it had before."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


class _Sums:
    """Sums over images.

    Attributes:
        classes: [num_classes, 4], by label: images, right in the top 1, right in the top 5, loss.
        predicted: [num_classes], images by prediction.
        bins: [BINS, 3], by confidence: images, right in the top 1, confidence.
        out_of_range: [1], number of labels out of range.
    """

    def __init__(self, num_classes: int, device: torch.device):
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.classes, self.predicted, self.bins = zeros(num_classes, 4), zeros(num_classes), zeros(BINS, 3)
        self.out_of_range = zeros(1)

    def add(self, logits: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Adds a batch."""
        count = len(self.classes)
        if logits.shape != (len(labels), count):
            raise ValueError(
                f"evaluate_model: the model must map {len(labels)} images to logits {[len(labels), count]}, "
                f"got {list(logits.shape)}"
            )
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # A label out of range would end the CUDA context, so count it and report it at the end.
        in_range = (labels >= 0) & (labels < count)
        self.out_of_range += (valid & ~in_range).sum()
        valid, labels = valid & in_range, labels.where(in_range, 0)
        own = logits.gather(1, labels.unsqueeze(1))
        before = torch.arange(count, device=logits.device) < labels.unsqueeze(1)
        # `~(logits <= own)`, unlike `logits > own`, counts NaN as larger.
        rank = (~(logits <= own) | ((logits == own) & before)).sum(1)
        loss = F.cross_entropy(logits, labels, reduction="none")
        confidence = logits.softmax(1).amax(1)
        bins = (confidence.nan_to_num() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)

        weight = valid.double()
        counted = torch.stack([weight, weight * (rank < 1), weight * (rank < 5), loss.where(valid, 0).double()], 1)
        self.classes.index_add_(0, labels, counted)
        self.predicted.index_add_(0, logits.argmax(1), weight)
        calibration = torch.stack([weight, weight * (rank < 1), confidence.where(valid, 0).double()], 1)
        self.bins.index_add_(0, bins, calibration)


def _reduced(sums: _Sums, routing: RoutingStatistics, start: float) -> Evaluation:
    """Adds the sums of all processes and computes the evaluation."""
    parts = [sums.classes, sums.predicted, sums.bins, sums.out_of_range, routing.sums]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        together = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(together)
        for part, total in zip(parts, together.split([part.numel() for part in parts]), strict=True):
            part.copy_(total.view_as(part))
    classes, bins = sums.classes.cpu(), sums.bins.cpu()
    seconds = time.perf_counter() - start
    if sums.out_of_range.item():
        raise ValueError(f"evaluate_model: {int(sums.out_of_range)} labels are not in [0, {len(classes)})")
    images, top1, top5, loss = classes.sum(0).tolist()
    if not images:
        raise ValueError("evaluate_model: there are no images")
    return Evaluation(
        images=int(images),
        top1=top1 / images,
        top5=top5 / images,
        loss=loss / images,
        calibration_error=float((bins[:, 1] - bins[:, 2]).abs().sum()) / images,
        images_per_second=images / seconds,
        classes=[
            _class(row, predicted) for row, predicted in zip(classes.tolist(), sums.predicted.tolist(), strict=True)
        ],
        layers=routing.layers(),
    )


def _class(row: list[float], predicted: float) -> dict[str, Any]:
    images, top1, top5, loss = row
    return {
        "images": int(images),
        "top1": top1 / images if images else None,
        "top5": top5 / images if images else None,
        "loss": loss / images if images else None,
        "predicted": int(predicted),
        "precision": top1 / predicted if predicted else None,
    }
