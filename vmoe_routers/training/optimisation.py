"""Optimisation: hyperparameters of a training step, parameter groups and optimizers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim._optim_factory import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from vmoe_routers.fields import check_fields
from vmoe_routers.inspect.record import plain_name
from vmoe_routers.moe import MoEMlp
from vmoe_routers.options import OptionError
from vmoe_routers.training.schedules import SCHEDULES, learning_rate

LOSSES = ("softmax", "sigmoid")
TRAINED = ("all", "router", "experts", "head")
DTYPES: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtype of autocast for each precision; None is no autocast."""
_MAX = (1 << 31) - 1
# Arguments of optimizers that have an option or come from the model.
_OWN_OPTIONS = {"lr": "learning_rate", "weight_decay": "weight_decay", "layer_decay": "layer_decay", "opt": "optimizer"}
_OWN_OPTIONS |= {"params": "model", "model_or_params": "model"}


@dataclass(frozen=True)
class Optimisation:
    """Hyperparameters of a training step.

    Attributes:
        optimizer: "adamw", "sgd" (momentum 0.9, without Nesterov), or another optimizer of timm by its name.
        optimizer_args: further arguments of the optimizer, such as betas.
        learning_rate: peak learning rate.
        final_learning_rate: learning rate at the end of the schedules cosine and linear, and of the cool-down.
        schedule: "cosine", "linear", "rsqrt" or "constant", after a linear warm-up from 0.
        warmup: steps of the warm-up, at most all steps. A value below 1 is a share of all steps.
        cooldown: last steps, in which the schedules rsqrt and constant fall linearly. Below 1, a share of all steps.
        timescale: steps after which rsqrt has divided the rate by sqrt(2).
        weight_decay: decoupled weight decay of kernels and of Soft MoE's scale. Biases, norms, positions and Phi are
            not decayed.
        head_weight_decay: weight decay of the head's kernel, by default weight_decay.
        layer_decay: factor of the learning rate from each block to the block before it. With 1 all rates are equal.
        loss: "softmax" cross-entropy, or "sigmoid": the sum of binary cross-entropies over the classes.
        label_smoothing: share of the target that is spread over all classes.
        clip: largest norm of the gradient. With 0 the gradient is not clipped.
        accumulate: number of parts of a batch. The parts run one after another, before one optimizer step.
        ema: decay of an average of the parameters, which is evaluated and exported in their place. 0: no average.
        trained: parameters that are trained: "all", or only the parameters of "router", "experts" or "head".
        precision: "float32", or "bfloat16" or "float16" for autocast.
        max_skipped: steps in a row that may be skipped because their loss or gradient is not finite.
    """

    optimizer: str = "adamw"
    optimizer_args: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-3
    final_learning_rate: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    cooldown: float = 0.0
    timescale: int = 10_000
    weight_decay: float = 0.05
    head_weight_decay: float | None = None
    layer_decay: float = 1.0
    loss: str = "softmax"
    label_smoothing: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    ema: float = 0.0
    trained: str = "all"
    precision: str = "float32"
    max_skipped: int = 10

    def __post_init__(self) -> None:
        check_fields(self)
        choices = {"schedule": SCHEDULES, "loss": LOSSES, "trained": TRAINED, "precision": tuple(DTYPES)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise OptionError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}", name)
        if self.optimizer == "adahessian":
            raise OptionError(
                "optimizer 'adahessian' needs second derivatives, which training does not make", "optimizer"
            )
        if self.optimizer not in ("adamw", "sgd") and self.optimizer not in list_optimizers():
            raise OptionError(
                f"optimizer {self.optimizer!r} does not exist; there are adamw, sgd and the names of "
                "timm.optim.list_optimizers(), such as lamb, lion and muon",
                "optimizer",
            )
        at_least(self, 1, "accumulate", "timescale", "max_skipped")
        if not 0 < self.learning_rate < math.inf:
            raise OptionError(f"learning_rate must be positive and finite, got {self.learning_rate}", "learning_rate")
        for name in ("final_learning_rate", "warmup", "cooldown", "weight_decay", "head_weight_decay", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise OptionError(f"{name} must be at least 0 and finite, got {value}", name)
        for name in ("label_smoothing", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name} must be in [0, 1), got {getattr(self, name)}", name)
        if not 0 < self.layer_decay <= 1:
            raise OptionError(f"layer_decay must be in (0, 1], got {self.layer_decay}", "layer_decay")
        for name in ("weight_decay", "head_weight_decay"):
            # A step multiplies kernels by 1 - decay * rate, which would be 0 or change their signs.
            if (value := getattr(self, name)) is not None and value * self.learning_rate >= 1:
                raise OptionError(
                    f"{name} times learning_rate {self.learning_rate:g} must be below 1, got {value:g}",
                    name,
                    "learning_rate",
                )
        for name, option in _OWN_OPTIONS.items():
            if name in self.optimizer_args:
                raise OptionError(
                    f"optimizer_args must not have {name!r}, which the option {option} sets", "optimizer_args", option
                )

    def check_steps(self, steps: int) -> None:
        """Checks that warm-up and cool-down fit in a training of `steps` steps.

        Raises:
            OptionError: They are longer than the training.
        """
        names = ("warmup", "cooldown") if self.schedule in ("rsqrt", "constant") else ("warmup",)
        values = [getattr(self, name) for name in names]
        if round(sum(value * steps if value < 1 else value for value in values)) > steps:
            got = ", ".join(f"{name} {value:g}" for name, value in zip(names, values, strict=True))
            raise OptionError(
                f"{' and '.join(names)} must take at most all {steps} steps of the training, got {got}", *names
            )

    def learning_rate_at(self, step: int, steps: int) -> float:
        """Computes the learning rate of step `step` of `steps`, counted from 0."""
        return learning_rate(
            step,
            steps,
            schedule=self.schedule,
            peak=self.learning_rate,
            final=self.final_learning_rate,
            warmup=_in_steps(self.warmup, steps),
            timescale=self.timescale,
            cooldown=_in_steps(self.cooldown, steps),
        )


def at_least(settings: Any, lowest: int, *names: str) -> None:
    """Refuses options that are not integers in [lowest, 2^31)."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not (isinstance(value, int) and lowest <= value <= _MAX):
            raise OptionError(f"{name} must be at least {lowest} and at most {_MAX}, got {value}", name)


def only(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    """Selects the options that are fields of the dataclass `kind`."""
    return {f.name: options[f.name] for f in fields(kind) if f.name in options}


def _in_steps(value: float, steps: int) -> int:
    return round(value * steps) if value < 1 else round(value)


def criterion(logits: Tensor, targets: Tensor, loss: str, label_smoothing: float) -> Tensor:
    """Computes the mean loss of logits [N, classes], in float32 or float64.

    Args:
        logits: [N, classes].
        targets: [N] int64 labels, or [N, classes] shares of the classes.
        loss, label_smoothing: As in `Optimisation`.
    """
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    if loss == "softmax":
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    classes = logits.shape[-1]
    if targets.ndim == 1:
        targets = F.one_hot(targets, classes)
    targets = targets.to(logits.dtype)
    if label_smoothing:
        targets = targets * (1 - label_smoothing) + label_smoothing / classes
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()


def freeze(model: nn.Module, trained: str) -> None:
    """Sets `requires_grad` of all parameters, for `Optimisation.trained`.

    Raises:
        OptionError: The model has no such parameters.
    """
    if trained == "all":
        return
    kept = list(_parts(model, trained))
    if not any(True for part in kept for _ in part.parameters()):
        raise OptionError(f"trained {trained!r}: {type(model).__name__} has no such parameters", "trained")
    model.requires_grad_(False)
    for part in kept:
        part.requires_grad_(True)


def _parts(model: Any, trained: str) -> Iterator[nn.Module]:
    if trained == "head":
        head = model.get_classifier() if hasattr(model, "get_classifier") else getattr(model, "head", None)
        yield from () if head is None else (head if isinstance(head, tuple) else (head,))
    for layer in (module for module in model.modules() if isinstance(module, MoEMlp)):
        if trained in ("router", "experts"):
            yield layer.router if trained == "router" else layer.experts


def parameter_groups(model: Any, o: Optimisation) -> list[dict[str, Any]]:
    """Groups the trained parameters by weight decay and by `lr_scale`, the factor of the learning rate."""
    names = {plain_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    named_plain = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    head = {id(p) for part in _parts(model, "head") for p in part.parameters()}
    scales = _layer_scales(model, o.layer_decay) if o.layer_decay < 1 else {}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in names.items():
        last = name.rpartition(".")[2]
        is_kernel = parameter.ndim >= 2 and last not in ("phi", "b1", "b2", "bias") and ".norm" not in f".{name}"
        is_kernel = is_kernel and name not in named_plain
        if not (is_kernel or name.endswith("router.logits.scale")):
            decay = 0.0
        else:
            decay = o.weight_decay
            if o.head_weight_decay is not None and id(parameter) in head:
                decay = o.head_weight_decay
        groups.setdefault((decay, scales.get(name, 1.0)), []).append(parameter)
    return [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()]


def _layer_scales(model: Any, decay: float) -> dict[str, float]:
    """Maps the name of a parameter to ``decay ** (layers above it)``, by timm's order of layers."""
    if not hasattr(model, "group_matcher"):
        raise OptionError(f"layer_decay needs a model of timm, got {type(model).__name__}", "layer_decay")
    layers: Any = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {plain_name(name): decay ** (last - layer) for name, layer in layers.items()}


def make_optimizer(model: nn.Module, o: Optimisation) -> torch.optim.Optimizer:
    """Makes the optimizer of the trained parameters.

    Raises:
        OptionError: The optimizer does not take `optimizer_args`.
    """
    groups = parameter_groups(model, o)
    try:
        if o.optimizer == "adamw":
            return torch.optim.AdamW(groups, lr=o.learning_rate, **{"fused": True, **o.optimizer_args})
        if o.optimizer == "sgd":
            # torch's fused SGD does not support sharded parameters.
            fused = not any(isinstance(p, DTensor) for group in groups for p in group["params"])
            return torch.optim.SGD(groups, lr=o.learning_rate, **{"momentum": 0.9, "fused": fused, **o.optimizer_args})
        return create_optimizer_v2(groups, o.optimizer, lr=o.learning_rate, **o.optimizer_args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:  # AssertionError: no CUDA device
        given = f" with {o.optimizer_args}" if o.optimizer_args else ""
        raise OptionError(f"optimizer {o.optimizer!r}{given}: {error}", "optimizer", "optimizer_args") from error
