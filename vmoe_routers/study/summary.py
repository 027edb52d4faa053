"""Rows of the study's table, one per variant, computed from the records of the runs.

Every variant and seed has one record, a dict that JSON can hold:

    variant        name, label, router (None: the dense ViT), top_k, combine, batch_priority, capacity_factor. An option
                   that the router does not have is None. ablation, arm: None for a run of the comparison.
    seed           the seed's number
    settings       the settings of the run, and the options of the router that an ablation changes
    epochs         a list of dicts: epoch, seconds (of training so far), train_loss, and accuracy (in [0, 1]) and loss
                   on the held-out images, or on the test images of a study without held-out images
    final          accuracy and loss after the last epoch, on the test images. A study that chooses hyperparameters has
                   no test images: its final values are from the held-out images.
    diverged       the reason why the training ended early, or None
    steps          number of training steps
    timing         step_ms: times of a training step, one per round. All variants took turns in one process, so they
                   have the same rounds. machine, date: where and when the steps were timed. The runs of ablations, and
                   all runs of a study without timed steps, lack this key.
    cost           slots (per image and MoE layer; for the dense ViT its tokens), mlp_flops, flops (of a forward pass,
                   per image), parameters
    layers         a list of dicts: block, load (tokens per image of each expert), utilisation, load_cv, dropped,
                   entropy, dead_experts. Empty for the dense ViT.
    transfer       data, accuracy; or None
    machine, date  where and when the run was made, from `vmoe_routers.machine`

Means are over seeds, with the standard error of the mean (sample deviation, ddof = 1). Differences to the dense ViT are
taken seed by seed before the mean, since runs of one seed share the trunk's initialisation, data order and
augmentation. Times are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from scipy.special import stdtrit
from torch import Tensor

from vmoe_routers.routers import ROUTERS

_ROUNDING = 1e-12  # standard errors this small come from rounding
Run = Mapping[str, Any]
VARIANT_KEYS = ("name", "label", "router", "top_k", "combine", "batch_priority", "capacity_factor")


class Stat(NamedTuple):
    """Mean of values, or a median of times.

    Attributes:
        mean: The mean or median.
        error: Its standard error; None for a single value.
        count: The number of values.
    """

    mean: float
    error: float | None
    count: int = 1

    def scaled(self, factor: float) -> Stat:
        """Converts the statistic to another unit."""
        return Stat(self.mean * factor, None if self.error is None else self.error * factor, self.count)

    def text(self, form: str, scale: float = 1.0) -> str:
        """Formats the scaled value with its error, as "97.2±0.1"; without an error, the value alone."""
        error = "" if self.error is None else f"±{self.error * scale:{form.lstrip('+')}}"
        return f"{self.mean * scale:{form}}{error}"

    def spaced(self, form: str, scale: float = 1.0) -> str:
        """Formats the value as `text` does, for sentences: "97.2 ± 0.1"."""
        return self.text(form, scale).replace("±", " ± ")

    def is_clear(self) -> bool:
        """Tells whether the 95 % interval by Student's t excludes 0; False if the error is None or 0."""
        if self.error is None or self.error <= _ROUNDING:
            return False
        return abs(self.mean) > float(stdtrit(self.count - 1, 0.975)) * self.error


@dataclasses.dataclass(frozen=True)
class Row:
    """Summary of the runs of one variant. Accuracies are in [0, 1]. None is a missing value.

    The differences use only seeds for which the dense ViT was run, too. `step_ratio` uses the rounds of the timing. A
    study without timed steps has no times. The routing metrics are means over seeds and MoE layers. `dead_experts` is
    the mean over seeds of the sum over layers.
    """

    name: str
    label: str
    router: str | None
    top_k: int | None
    combine: str | None
    batch_priority: bool | None
    capacity_factor: float | None
    seeds: int
    accuracy: Stat
    loss: Stat
    accuracy_difference: Stat | None
    loss_difference: Stat | None
    train_seconds: Stat | None
    step_ms: Stat | None
    step_ratio: Stat | None
    slots: float
    mlp_flops: float
    mlp_flops_ratio: float | None
    flops: float
    flops_ratio: float | None
    parameters: float
    dropped: float | None
    load_cv: float | None
    utilisation: float | None
    dead_experts: float | None
    transfer: Stat | None


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """Routing in one MoE layer of a variant, as means over seeds.

    `load` is sorted from the most to the least loaded expert before the mean is taken, because only the rank relates
    experts of different seeds.
    """

    name: str
    label: str
    router: str
    block: int
    load: list[float]
    utilisation: float | None
    load_cv: float | None
    dropped: float | None
    entropy: float | None
    dead_experts: float | None


def stat(values: Iterable[float]) -> Stat:
    """Computes the mean of at least one value, with its standard error."""
    values = [float(value) for value in values]
    count = len(values)
    mean = _sum(values) / count
    if count == 1:
        return Stat(mean, None)
    variance = _sum((value - mean) * (value - mean) for value in values) / (count - 1)
    return Stat(mean, math.sqrt(variance / count), count)


def chance_accuracy(labels: Tensor) -> float:
    """Returns the accuracy up to which a model may have learned nothing.

    This is the share of the most frequent class plus two standard errors of an accuracy on this number of images. A
    study that chooses hyperparameters measures held-out images, in which every class is as frequent as in the test
    images.
    """
    share = float(labels.bincount().max()) / len(labels)
    return share + 2 * math.sqrt(share * (1 - share) / len(labels))


def median_stat(values: Sequence[float]) -> Stat:
    """Computes the median of times, which may include outliers. The median deviation gives its standard error."""
    median = statistics.median(values)
    if len(values) == 1:
        return Stat(median, None)
    # For a normal distribution, 1.4826 median deviations are one standard deviation, and the standard error of a
    # median is sqrt(pi / 2) times the standard error of a mean.
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return Stat(median, deviation * math.sqrt(math.pi / 2 / len(values)), len(values))


def accuracy(run: Run) -> float:
    """Final accuracy of a run, in [0, 1]."""
    return run["final"]["accuracy"]


def loss(run: Run) -> float:
    """Final loss of a run."""
    return run["final"]["loss"]


class Measure(NamedTuple):
    """Final result of a run, by which models are compared.

    Attributes:
        name: The key of `MEASURES`.
        of: Reads the result from a run.
        sign: 1 if a greater value is better, -1 if a smaller value is better.
        scale: Factor to the unit in which tables show the measure.
        form: Format of a difference in that unit.
        unit: The unit of a difference.
        better: What a better model is or has, in words.
    """

    name: str
    of: Callable[[Run], float]
    sign: int
    scale: float
    form: str
    unit: str
    better: str


MEASURES: dict[str, Measure] = {
    "accuracy": Measure("accuracy", accuracy, 1, 100.0, "+.2f", "points", "is more accurate"),
    "loss": Measure("loss", loss, -1, 1.0, "+.4f", "nats", "has a lower loss"),
}


def step_times(runs: Sequence[Run]) -> list[float]:
    """Times of a training step of one variant in milliseconds, one per round; empty if no step was timed."""
    return runs[0].get("timing", {}).get("step_ms", []) if runs else []


def step_ratios(runs: Sequence[Run], others: Sequence[Run]) -> list[float]:
    """Times of a step of one variant over the times of another, one per round; empty if a variant was not timed."""
    times, other_times = step_times(runs), step_times(others)
    return [a / b for a, b in zip(times, other_times, strict=True)] if times and other_times else []


def paired(runs: Sequence[Run], others: Sequence[Run], value: Callable[[Run], float]) -> list[float]:
    """Computes the differences of `value` between `runs` and `others`, one for every seed in both."""
    by_seed = {run["seed"]: run for run in others}
    return [value(run) - value(by_seed[run["seed"]]) for run in runs if run["seed"] in by_seed]


def by_variant(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs of the comparison grouped by variant and sorted by seed. The order of `runs` does not matter.

    The dense ViT comes first, then the routers in the order of `ROUTERS`, then own routers by name. Variants of a
    router are sorted by K, combine (softmax before plan), batch priority (without before with) and capacity factor.
    """
    groups: dict[str, dict[int, Run]] = {}
    for run in runs:
        if run["variant"]["ablation"] is not None:
            continue
        seeds = groups.setdefault(run["variant"]["name"], {})
        if run["seed"] in seeds:
            raise ValueError(f"by_variant: two runs of variant {run['variant']['name']!r} with seed {run['seed']}")
        seeds[run["seed"]] = run
    ordered = sorted(groups.values(), key=lambda seeds: _order(next(iter(seeds.values()))["variant"]))
    return [[seeds[seed] for seed in sorted(seeds)] for seeds in ordered]


def _order(variant: Mapping[str, Any]) -> tuple:
    router = variant["router"]
    place = -1 if router is None else ROUTERS.index(router) if router in ROUTERS else len(ROUTERS)
    combine = variant["combine"]
    capacity = variant["capacity_factor"]
    return (
        place,
        router or "",
        variant["top_k"] or 0,
        combine == "plan",
        bool(variant["batch_priority"]),
        capacity or 0.0,
        variant["name"],
    )


def _mean(values: Iterable[float | None]) -> float | None:
    found = [float(value) for value in values if value is not None]
    return _sum(found) / len(found) if found else None


def _sum(values: Iterable[float]) -> float:
    """Sums exactly. Infinities of both signs, from a diverging training, sum to NaN."""
    values = list(values)
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


def layer_mean(runs: Iterable[Run], key: str) -> float | None:
    """Computes the mean of a routing metric over runs and MoE layers; None for the dense ViT."""
    return _mean(layer[key] for run in runs for layer in run["layers"])


def summarise(runs: Iterable[Run]) -> list[Row]:
    """One row per variant, in the order of `by_variant`."""
    groups = by_variant(runs)
    dense = next((group for group in groups if group[0]["variant"]["router"] is None), [])
    return [_row(group, dense) for group in groups]


def _row(runs: Sequence[Run], dense: Sequence[Run]) -> Row:
    def cost(key: str, of: Sequence[Run] = runs) -> float:
        return stat(run["cost"][key] for run in of).mean

    def difference(value: Callable[[Run], float]) -> Stat | None:
        values = paired(runs, dense, value)
        return stat(values) if values and runs is not dense else None

    times, ratios = step_times(runs), step_ratios(runs, dense)
    step_ms = median_stat(times) if times else None
    dead = [sum(layer["dead_experts"] for layer in run["layers"]) for run in runs if run["layers"]]
    transfers = [run["transfer"]["accuracy"] for run in runs if run["transfer"]]
    variant = runs[0]["variant"]
    return Row(
        **{key: variant[key] for key in VARIANT_KEYS},
        seeds=len(runs),
        accuracy=stat(map(accuracy, runs)),
        loss=stat(map(loss, runs)),
        accuracy_difference=difference(accuracy),
        loss_difference=difference(loss),
        train_seconds=step_ms and step_ms.scaled(runs[0]["steps"] / 1e3),
        step_ms=step_ms,
        step_ratio=median_stat(ratios) if ratios else None,
        slots=cost("slots"),
        mlp_flops=cost("mlp_flops"),
        mlp_flops_ratio=cost("mlp_flops") / cost("mlp_flops", dense) if dense else None,
        flops=cost("flops"),
        flops_ratio=cost("flops") / cost("flops", dense) if dense else None,
        parameters=cost("parameters"),
        dropped=layer_mean(runs, "dropped"),
        load_cv=layer_mean(runs, "load_cv"),
        utilisation=layer_mean(runs, "utilisation"),
        dead_experts=_mean(dead),
        transfer=stat(transfers) if transfers else None,
    )


def summarise_layers(runs: Iterable[Run]) -> list[LayerRow]:
    """One row per variant and MoE layer. The dense ViT has no rows."""
    rows = []
    for group in by_variant(runs):
        variant = group[0]["variant"]
        for layers in zip(*(run["layers"] for run in group), strict=True):
            loads = zip(*(sorted(layer["load"], reverse=True) for layer in layers), strict=True)
            rows.append(
                LayerRow(
                    name=variant["name"],
                    label=variant["label"],
                    router=variant["router"],
                    block=layers[0]["block"],
                    load=[stat(load).mean for load in loads],
                    **{
                        key: _mean(layer[key] for layer in layers)
                        for key in ("utilisation", "load_cv", "dropped", "entropy", "dead_experts")
                    },
                )
            )
    return rows
