"""Trainer: training steps of a model, and the state for a checkpoint."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from vmoe_routers.distributed import Ema, clip_grad_norm_
from vmoe_routers.moe import aux_loss
from vmoe_routers.training.diagnosis import first_not_finite
from vmoe_routers.training.optimisation import DTYPES, Optimisation, criterion, make_optimizer
from vmoe_routers.training.seeding import seed_of

_FORMS = ("fused", "foreach", "capturable", "differentiable")  # options that select an optimizer's implementation


class TrainingError(FloatingPointError):
    """Training that cannot continue. The message has the reason."""


@dataclass(frozen=True)
class StepReport:
    """Values of a step, on the device. Reading a tensor waits for the device.

    Attributes:
        loss: mean loss of the batch, without the routers' losses.
        aux_loss: the routers' auxiliary losses.
        grad_norm: norm of the gradient before clipping.
        learning_rate: the step's learning rate.
    """

    loss: Tensor
    aux_loss: Tensor
    grad_norm: Tensor
    learning_rate: float


class Trainer:
    """Trains a model: loss, gradient, clipping, optimizer, average of the parameters. Every call is one step.

    The loss is the criterion plus the routers' auxiliary losses. Noise and dropout of a step are a function of (seed,
    step, rank). A step whose loss or gradient is not finite changes no parameter, and is counted.

    Args:
        model: The model, which is trained in place: plain, in DistributedDataParallel, or parallelized by
            `vmoe_routers.distributed.parallelize`.
        optimisation: The hyperparameters.
        steps: Number of steps of the whole training, which the schedule needs.
        seed: Seed of noise and dropout.
        rank: The number of this process.
        autocast: Whether the model runs under autocast with the precision of `optimisation`. A model that was
            parallelized for this precision needs no autocast.

    Raises:
        OptionError: The hyperparameters do not fit the model or the number of steps.

    Attributes:
        step: Number of steps so far.
        skipped: Number of steps so far whose loss or gradient was not finite.
        ema: The average of the parameters, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        optimisation: Optimisation,
        steps: int,
        *,
        seed: int = 0,
        rank: int = 0,
        autocast: bool = True,
    ):
        optimisation.check_steps(steps)
        self.model: nn.Module = model
        self.optimisation: Optimisation = optimisation
        self.steps: int = steps
        self.seed: int = seed
        self.rank: int = rank
        self.step: int = 0
        self.plain: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.parameters: list[nn.Parameter] = [
            parameter for parameter in self.plain.parameters() if parameter.requires_grad
        ]
        self.device: torch.device = self.parameters[0].device
        self.optimizer: torch.optim.Optimizer = make_optimizer(self.plain, optimisation)
        self.ema: Ema | None = Ema(self.plain, optimisation.ema) if optimisation.ema else None
        self.dtype: torch.dtype | None = DTYPES[optimisation.precision] if autocast else None
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # On the device, so that counting does not wait for the device.
        self._skipped = torch.zeros(2, dtype=torch.int64, device=self.device)  # in all; in a row until now
        # Fused optimizers skip a step by a flag on the device. All other optimizers need the flag on the host.
        sharded = any(hasattr(parameter, "device_mesh") for parameter in self.parameters)
        self._skips_on_device = getattr(self.optimizer, "_step_supports_amp_scaling", False) and not sharded

    @property
    def skipped(self) -> int:
        """Number of steps so far whose loss or gradient was not finite. Waits for the device."""
        return int(self._skipped[0])

    def __call__(self, images: Tensor, targets: Tensor) -> StepReport:
        """Trains on a batch: images [N, channels, height, width], targets [N] labels or [N, classes] shares.

        `Optimisation.accumulate` must divide N.
        """
        o = self.optimisation
        if len(images) % o.accumulate:
            raise ValueError(f"Trainer: {len(images)} images are not a multiple of accumulate = {o.accumulate}")
        self._seed_step()
        rate = o.learning_rate_at(self.step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        parts = list(zip(images.chunk(o.accumulate), targets.chunk(o.accumulate), strict=True))
        losses = []
        for number, (x, y) in enumerate(parts, 1):
            with self._synchronising(number == len(parts)):
                losses.append(self._backward(x, y, len(parts)))
        loss, auxiliary = torch.stack(losses).mean(0)
        self.scaler.unscale_(self.optimizer)
        # Without `clip`, the norm is computed, and nothing is clipped.
        norm = clip_grad_norm_(self.parameters, o.clip or float("inf"))
        self._apply(norm)
        self.step += 1
        return StepReport(loss, auxiliary, norm, rate)

    def _seed_step(self) -> None:
        """Seeds noise and dropout of the step, and the random choices of the optimizer, which all ranks share."""
        seed = seed_of(self.seed, "step", self.step, self.rank)
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 100 times as long
        else:
            torch.manual_seed(seed)
        choices = getattr(self.optimizer, "rng", None)  # timm's Kron
        if isinstance(choices, random.Random):
            choices.seed(seed_of(self.seed, "optimizer", self.step))

    def _backward(self, images: Tensor, targets: Tensor, parts: int) -> Tensor:
        """Adds the gradient of a part of the batch. Returns its loss and its auxiliary loss."""
        o = self.optimisation
        with self.autocasting():
            logits = self.model(images)
        loss = criterion(logits, targets, o.loss, o.label_smoothing)
        auxiliary = aux_loss(self.plain).to(loss.dtype)
        total = loss + auxiliary
        # A gradient can be finite although the loss is infinite. NaN in the gradient makes all ranks skip the step.
        weight = torch.where(torch.isfinite(total.detach()), 1.0, float("nan"))
        self.scaler.scale(total / parts * weight).backward()
        return torch.stack([loss.detach(), auxiliary.detach()])

    def _synchronising(self, last: bool) -> AbstractContextManager[Any]:
        """Returns a context in which gradients are summed over the ranks only for the last part of a batch."""
        if isinstance(self.model, DistributedDataParallel):
            return nullcontext() if last else self.model.no_sync()
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def _apply(self, norm: Tensor) -> None:
        """Updates the parameters, unless the gradient is not finite."""
        bad = ~torch.isfinite(norm)
        self._skipped[0] += bad
        self._skipped[1] = (self._skipped[1] + 1) * bad
        # Do not call scaler.step: if the norm overflows, clipping makes a finite gradient 0, and scaler.step would
        # apply this wrong gradient.
        if self._skips_on_device:
            optimizer: Any = self.optimizer
            optimizer.found_inf = bad.to(torch.float32)
            optimizer.step()
            del optimizer.found_inf
        elif not bad:
            self.optimizer.step()
        if self.scaler.is_enabled():
            self.scaler.update()  # `unscale_` has recorded whether the gradient was finite
        self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.update(self.plain)

    def autocasting(self) -> AbstractContextManager[Any]:
        """Returns a context in which the model runs in the precision of the training."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def averaged(self) -> AbstractContextManager[None]:
        """Returns a context in which the model has the average of its parameters, if there is one."""
        return nullcontext() if self.ema is None else self.ema.swapped(self.plain)

    def check(self, images: Tensor) -> None:
        """Ends the training if too many steps in a row were skipped. Waits for the device.

        Args:
            images: The last batch, which is used to locate the fault.

        Raises:
            TrainingError: The last `Optimisation.max_skipped` steps were skipped. The message names the first layer
                whose output or parameter is not finite.
        """
        in_a_row = int(self._skipped[1])
        if in_a_row < self.optimisation.max_skipped:
            return
        part = images[: len(images) // self.optimisation.accumulate]
        place = first_not_finite(self.plain, part, self.device.type, self.dtype)
        raise TrainingError(
            f"step {self.step}: loss or gradient was not finite in the last {in_a_row} steps; {place}. "
            "A smaller learning_rate, a longer warmup or precision float32 may help"
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for `torch.distributed.checkpoint`. Names do not depend on the number of ranks."""
        model, optimizer = get_state_dict(self.plain, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "step": torch.tensor(self.step), "skipped": self._skipped}
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        if self.scaler.is_enabled():
            state["scaler"] = {name: torch.tensor(value) for name, value in self.scaler.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state of `state_dict`."""
        # Keep the optimizer's implementation: the implementation in the state belongs to the layout that wrote the
        # state.
        forms = [{name: g[name] for name in _FORMS if name in g} for g in self.optimizer.param_groups]
        set_state_dict(self.plain, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        for group, form in zip(self.optimizer.param_groups, forms, strict=True):
            group.update(form)
        self.step = int(state["step"])
        self._skipped.copy_(state["skipped"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict({name: value.item() for name, value in state["scaler"].items()})
