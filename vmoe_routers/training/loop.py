"""A training loop for images that fit in memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_routers.moe import aux_loss
from vmoe_routers.training.data import Images


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step. An incomplete last batch of an epoch is left out.
        learning_rate: peak learning rate of AdamW, after a linear warm-up and before a cosine decay to 0.
        warmup: the warm-up's share of the steps.
        weight_decay: decoupled weight decay, on matrices only.
        clip: largest norm of the gradient.
        shift: largest random shift in both directions, in pixels.
        seed: seed of data order, shifts, noise and dropout.
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    clip: float = 1.0
    shift: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Epoch:
    """The report of `train` after an epoch.

    Attributes:
        epoch: the epoch's number, from 1.
        seconds: training time of all epochs so far.
        train_loss: the epoch's mean loss.
    """

    epoch: int
    seconds: float
    train_loss: float


class Step:
    """Training steps of a model: loss, gradient, clipping, AdamW, schedule. Every call is one step.

    The loss is the cross-entropy plus the routers' auxiliary losses.

    Args:
        model: the model, which is trained in place.
        recipe: the hyperparameters.
        steps: number of steps of the whole training, which the schedule needs.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, steps: int):
        self.model = model
        self.clip = recipe.clip
        self.device = next(model.parameters()).device
        self.optimizer = _optimizer(model, recipe)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, _schedule(recipe, steps))

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Trains on a batch. Returns the cross-entropy before the step, when the device has finished the step."""
        loss = F.cross_entropy(self.model(images), labels)
        (loss + aux_loss(self.model)).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return loss.detach()


def train(
    model: nn.Module,
    data: Images,
    recipe: Recipe,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> int:
    """Trains `model` on the training images of `data`, in place.

    Order and shifts depend on `recipe.seed` alone, so all models see the same images.

    Args:
        model: the model.
        data: the data set.
        recipe: the hyperparameters.
        on_epoch: called after every epoch.

    Returns:
        The number of steps.

    Raises:
        ValueError: there are fewer training images than a batch has.
    """
    device = next(model.parameters()).device
    images, labels = data.train_images.to(device), data.train_labels.to(device)
    steps_per_epoch = len(labels) // recipe.batch_size
    if steps_per_epoch == 0:
        raise ValueError(f"train: {len(labels)} images are less than one batch of {recipe.batch_size}")
    train_step = Step(model, recipe, steps_per_epoch * recipe.epochs)
    generator = torch.Generator().manual_seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    seconds = 0.0
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        order = torch.randperm(len(labels), generator=generator).to(device)
        losses = []
        start = time.perf_counter()
        for step in range(steps_per_epoch):
            chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            losses.append(train_step(random_shift(images[chosen], recipe.shift, generator), labels[chosen]))
        seconds += time.perf_counter() - start
        on_epoch(Epoch(epoch, seconds, float(torch.stack(losses).mean())))
    return steps_per_epoch * recipe.epochs


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    # Norms, biases, scales and position embeddings are not decayed. The experts' biases have two axes, [E, F].
    plain = (".b1", ".b2", "norm.weight", "norm.bias", "pos_embed", "cls_token")
    decayed, rest = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim >= 2 and not name.endswith(plain)
        (decayed if matrix else rest).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def _schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    warmup = max(1, round(recipe.warmup * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return factor


def random_shift(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shifts every image of [N, channels, height, width] by a random offset. Zeros fill the gap."""
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    offsets = torch.randint(2 * pixels + 1, (2, count, 1), generator=generator).to(images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)
    columns = offsets[1] + torch.arange(width, device=images.device)
    padded = F.pad(images, [pixels] * 4)
    which = torch.arange(count, device=images.device)
    # Indexing around a slice puts the indexed axes first: [N, height, width, channels].
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
