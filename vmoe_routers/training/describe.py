"""Describes a training in a few lines: data, model, cost, steps, memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vmoe_routers.memory import in_words
from vmoe_routers.models import cost
from vmoe_routers.moe import MoEMlp
from vmoe_routers.training.processes import World
from vmoe_routers.training.samples import Data
from vmoe_routers.training.settings import TrainSettings
from vmoe_routers.training.transforms import NORMALIZATIONS, Augmentation

if TYPE_CHECKING:
    from vmoe_routers.training.train import Plan


def describe(settings: TrainSettings, data: Data, plan: Plan, model: nn.Module, world: World) -> str:
    """Describes data, model and steps, one line each. The model may be sharded."""
    size = f" of {data.size} x {data.size}" if data.size else ""
    layers = sum(isinstance(module, MoEMlp) for module in model.modules())
    routers = sorted({type(m.router).__name__ for m in model.modules() if isinstance(m, MoEMlp)})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in model.parameters())
    moe = f", {_counted(layers, 'MoE layer')} ({', '.join(routers)})" if layers else ", dense"
    only = f", {trained:,} of them trained" if trained < parameters else ""
    return (
        f"{data.name}: {len(data.train):,} training and {len(data.test):,} test images{size}, "
        f"{data.num_classes} classes\n"
        f"{settings.model}{_changed(settings, plan.image_size)}: {parameters:,} parameters{only}{moe}"
        f"{_operations(model)}\n"
        f"{_counted(settings.epochs, 'epoch')} of {_counted(plan.steps_per_epoch, 'step')} with "
        f"{_counted(settings.batch_size, 'image')} of "
        f"{plan.image_size} x {plan.image_size} pixels, "
        f"{_counted(world.size, 'process', 'es')} on {world.device.type}, {settings.precision}"
    )


def _changed(settings: TrainSettings, image_size: int) -> str:
    """Returns arguments that the model's name does not state, such as image size 192 for vit_tiny_patch16_224."""
    if settings.model == "vit_moe":
        return ""
    given = dict(settings.model_args)
    named = settings.model.rpartition("_")[2]
    if named.isdigit() and int(named) != image_size:
        given["image_size"] = image_size
    return f" with {', '.join(f'{name} {value}' for name, value in given.items())}" if given else ""


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def _operations(model: Any) -> str:
    try:
        found = cost(model)
    except (TypeError, AttributeError):  # not a ViT of timm
        return ""
    return f", {found['active_parameters'] / 1e6:.2f} million active, {found['flops'] / 1e9:.3g} GFLOPs per image"


def memory_estimate(model: nn.Module, settings: TrainSettings, data: Data, image_size: int, world: World) -> str:
    """Estimates the memory of one process, in a line.

    Activations are the tensors that autograd keeps for one group of images, times the number of groups. Temporary
    buffers are not counted, such as the parameters of the layer that FSDP2 has gathered.

    Args:
        model: The model before `lay_out`, which shards it.
        settings, data, image_size, world: The values of the training.
    """
    sharded = world.size // settings.replicate if settings.parallel == "fsdp" else 1
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) / sharded
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad) / sharded
    states = trained * (2 if settings.optimizer != "sgd" else 1) + (parameters if settings.ema else 0)
    images = settings.batch_size // world.size // settings.accumulate
    group = max((m.group_size for m in model.modules() if isinstance(m, MoEMlp)), default=1)
    activations = _kept(model, torch.zeros(group, data.channels, image_size, image_size)) * images / group
    total = parameters + trained + states + activations
    of_each = f" of each process, sharded by {sharded}" if sharded > 1 else ""
    return (
        f"memory{of_each}: about {in_words(total)} (parameters {in_words(parameters)}, gradients {in_words(trained)}, "
        f"optimizer and average {in_words(states)}, activations of {images} images in float32 {in_words(activations)})"
    )


def _kept(model: nn.Module, images: Tensor) -> int:
    """Measures the bytes that autograd keeps for a forward, without parameters."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(images).float().square().mean()
    del loss
    return sum(found.values())


def draw_batch(images: Tensor, augmentation: Augmentation, path: Path) -> None:
    """Writes the first 64 images of a batch as one picture.

    Args:
        images: [N, channels, height, width], normalized by `augmentation`.
        augmentation: the augmentation of the training.
        path: the PNG file.
    """
    from torchvision.utils import save_image

    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in NORMALIZATIONS[augmentation.normalization])
    if images.shape[1] == 1:
        mean, std = mean.mean(1, keepdim=True), std.mean(1, keepdim=True)
    shown = (images[:64].cpu() * std + mean).clamp(0, 1)
    small = max(1, 48 // shown.shape[-1])  # magnifies tiny images
    save_image(shown.repeat_interleave(small, 2).repeat_interleave(small, 3), path, nrow=8, padding=4, pad_value=1)
