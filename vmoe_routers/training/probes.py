"""few_shot: fits probes to the frozen features of a model by name, for ``vmoe-routers fewshot``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import Subset

from vmoe_routers.files import make_output
from vmoe_routers.machine import here_and_now
from vmoe_routers.options import OptionError
from vmoe_routers.training.evaluation import eval_mode
from vmoe_routers.training.fewshot import Examples, draw_shots, probe_seed, ridge_probe
from vmoe_routers.training.linear_probe import linear_probe
from vmoe_routers.training.loader import evaluation_batches
from vmoe_routers.training.processes import processes
from vmoe_routers.training.report import make_table, write_json
from vmoe_routers.training.samples import Samples, Tensors
from vmoe_routers.training.subject import open_subject

PROBES = ("ridge", "linear")
RESULT = "fewshot.json"


@dataclass(frozen=True)
class ProbeResult:
    """Accuracy of a probe.

    Attributes:
        shots: training images per class. None means all of them.
        seed: seed of the draw, or None if all images are used.
        accuracy: share of the test images that are classified correctly.
        l2: regulariser, chosen on training images to which the probe was not fitted.
    """

    shots: int | None
    seed: int | None
    accuracy: float
    l2: float


def few_shot(
    model: str,
    data: str = "digits",
    data_root: Path | None = None,
    probe: str = "ridge",
    shots: tuple[int, ...] = (1, 5, 10),
    seeds: tuple[int, ...] = (0, 1, 2),
    image_size: int | None = None,
    normalization: str | None = None,
    crop_pct: float | None = None,
    batch_size: int = 128,
    pretrained: bool = False,
    model_args: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int = 2,
    output: Path = Path("fewshot"),
    *,
    console: Console | None = None,
) -> list[ProbeResult]:
    """Fits probes to the features before the model's head, prints their accuracies, and writes fewshot.json.

    The ridge probe is ridge regression on a few images per class, as in the reference (arXiv 2106.05974). The linear
    probe is logistic regression on all training images.

    Args:
        model: a folder of save_pretrained, a study's record (runs/*-seed*.json), P of a V-MoE checkpoint (P.index),
            "vit_moe", or a model of timm.
        data: "digits", a folder, or another name that `open_data` takes (docs/data.md).
        data_root: folder of data sets of torchvision, also for downloads.
        probe: "ridge" or "linear".
        shots: training images per class for the ridge probe. A class with fewer images gives all of them.
        seeds: seeds of the draws for the ridge probe. The table has the mean over them.
        image_size: height and width of the model's input in pixels, by default the model's own.
        normalization: "inception", "imagenet", "clip" or "none". By default the model's, if it is known.
        crop_pct: central share of an image that the model sees, by default as in the model's training.
        batch_size: images per batch.
        pretrained: load timm's weights of the model, which are downloaded.
        model_args: arguments that replace the model's own, such as {capacity_factor: 2}.
        device: "auto", "cpu" or "cuda".
        workers: processes that load images.
        output: the folder for the file.
        console: console that shows the table.

    Returns:
        One result for every number of shots and every seed. The linear probe has one result in all.

    Raises:
        ValueError: Options, model or data do not fit together. The message is for the user.
        OSError: The file cannot be written.
    """
    console = console or Console(markup=False, emoji=False, highlight=False)
    _check(probe, shots, seeds, batch_size)
    with processes(device) as world:
        if world.size > 1:
            raise OptionError("few_shot runs in one process; start it without torchrun")
        subject = open_subject(
            model,
            data,
            data_root=data_root,
            image_size=image_size,
            normalization=normalization,
            crop_pct=crop_pct,
            pretrained=pretrained,
            model_args=model_args,
            device=world.device,
        )
        if not (hasattr(subject.model, "forward_features") and hasattr(subject.model, "forward_head")):
            raise OptionError(f"model {model!r} has no features before its head, as models of timm have", "model")
        train = subject.data.train
        draws = {} if probe == "linear" else _draw(train, shots, seeds)
        make_output(output)

        def features(samples: Samples) -> Examples:
            batches = evaluation_batches(
                samples, subject.transform, batch_size=batch_size, workers=workers, device=world.device
            )
            with batches:
                return features_of(subject.model, batches)

        test = features(subject.data.test)
        if probe == "linear":
            results = [ProbeResult(None, None, *linear_probe(features(train), test))]
        else:
            results = _ridge_probes(train, test, features, draws)
    console.print(f"{model} on {subject.data.name}, {len(test.labels):,} test images; {probe} probe", soft_wrap=True)
    console.print(f"input: {subject}", soft_wrap=True)
    console.print(_table(results))
    record = {"model": model, "data": data, "input": subject.input(), "probe": probe}
    write_json(output / RESULT, {**record, "results": [asdict(result) for result in results], **here_and_now()})
    console.print(f"written: {output / RESULT}", soft_wrap=True)
    return results


def _check(probe: str, shots: Sequence[int], seeds: Sequence[int], batch_size: int) -> None:
    if probe not in PROBES:
        raise OptionError(f"probe must be {' or '.join(PROBES)}, got {probe!r}", "probe")
    for name, values, least in (("shots", shots, 1), ("seeds", seeds, 0), ("batch_size", [batch_size], 1)):
        if not values or min(values) < least:
            got = batch_size if name == "batch_size" else list(values)
            raise OptionError(f"{name} must be at least {least}, got {got}", name)


def _draw(train: Samples, shots: Sequence[int], seeds: Sequence[int]) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Draws shots and held-out images for every number of shots and every seed. Returns their indices."""
    labels = labels_of(train)
    try:
        return {(k, seed): draw_shots(labels, k, probe_seed(0, seed)) for k in shots for seed in seeds}
    except ValueError as error:
        raise OptionError(f"shots: {error}", "shots") from None


def _ridge_probes(
    train: Samples,
    test: Examples,
    features: Callable[[Samples], Examples],
    draws: Mapping[tuple[int, int], tuple[Tensor, Tensor]],
) -> list[ProbeResult]:
    # Read only images that are in a draw.
    needed = torch.cat([indices for draw in draws.values() for indices in draw]).unique()
    found, results = features(part_of(train, needed)), []
    for (k, seed), draw in draws.items():
        places = (torch.searchsorted(needed, indices) for indices in draw)
        chosen, held_out = (Examples(found.features[place], found.labels[place]) for place in places)
        results.append(ProbeResult(k, seed, *ridge_probe(chosen, held_out, test)))
    return results


@torch.no_grad()
def features_of(model: nn.Module, batches: Iterable[Sequence[Tensor]]) -> Examples:
    """Computes the features before the head, [N, D] float32, and returns them with the labels, on the CPU.

    Args:
        model: A model with `forward_features` and `forward_head`, as models of timm have.
        batches: Images and labels. Further values are not used.
    """
    parameter, features, labels = next(model.parameters()), [], []
    with eval_mode(model):
        for images, y, *_ in batches:
            x = model.forward_features(images.to(parameter.device, parameter.dtype))  # type: ignore[operator]
            features.append(model.forward_head(x, pre_logits=True).float().cpu())  # type: ignore[operator]
            labels.append(y.cpu())
    return Examples(torch.cat(features), torch.cat(labels))


def labels_of(samples: Samples) -> Tensor:
    """Returns all labels [N] of a data set. Reads every image if the data set does not list its labels."""
    labels = getattr(samples, "labels", None)
    if labels is None:
        labels = [samples[index][1] for index in range(len(samples))]
    return torch.as_tensor(labels)


def part_of(samples: Samples, indices: Tensor) -> Samples:
    """Selects the images of a data set at these indices."""
    if isinstance(samples, Tensors):
        return Tensors(samples.images[indices], samples.labels[indices])
    return Subset(samples, indices.tolist())  # type: ignore[arg-type]


def _table(results: Sequence[ProbeResult]) -> Table:
    """Makes the table of mean accuracies over the seeds, with standard deviations."""
    table = make_table("shots per class", "accuracy", "deviation", "draws")
    for shots in dict.fromkeys(result.shots for result in results):
        found = [result.accuracy for result in results if result.shots == shots]
        deviation = f"{statistics.stdev(found):.4f}" if len(found) > 1 else ""
        draws = "" if shots is None else str(len(found))
        table.add_row("all" if shots is None else str(shots), f"{statistics.mean(found):.4f}", deviation, draws)
    return table
