"""Makes the model of a training, freezes parts, moves it to its device and distributes it over the processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vmoe_routers.distributed import Meshes, parallelize
from vmoe_routers.moe import MoEMlp
from vmoe_routers.options import OptionError, did_you_mean
from vmoe_routers.training.models import load_model, refuse_names
from vmoe_routers.training.optimisation import DTYPES, freeze
from vmoe_routers.training.processes import World
from vmoe_routers.training.samples import Data
from vmoe_routers.training.settings import TrainSettings

_ORIGINS = {
    **dict.fromkeys(("num_classes", "in_chans", "channels"), "the data"),
    **dict.fromkeys(("img_size", "image_size"), "the option image_size"),
    "pretrained": "the option pretrained",
    "upcycled": "the option upcycle",
}


def make_model(settings: TrainSettings, data: Data, image_size: int) -> nn.Module:
    """Makes or loads the model of the settings, from their seed, on the CPU.

    Raises:
        OptionError: Settings do not fit together, or do not fit the model.
    """
    if not settings.model:
        raise OptionError("model must not be empty: this recipe fine-tunes a model that you name", "model")
    refuse_names(settings.model_args, _ORIGINS)
    chosen = ("num_experts", "capacity_factor", "top_k", "group_size")
    routing = {name: value for name in chosen if (value := getattr(settings, name)) is not None}
    arguments: dict[str, Any] = dict(settings.model_args)
    upcycled: dict[str, Any] | None = None
    if settings.upcycle is not None:
        upcycled = {"num_experts": 8, **routing, "router": _router(settings.upcycle, "upcycle")}
    else:
        arguments |= routing
        if settings.router is not None:
            arguments["router"] = None if settings.router == "dense" else _router(settings.router, "router")
    torch.manual_seed(settings.seed)
    model: Any = load_model(
        settings.model,
        num_classes=data.num_classes,
        channels=data.channels,
        image_size=image_size,
        upcycled=upcycled,
        pretrained=settings.pretrained,
        **arguments,
    )
    if settings.head_bias is not None:
        head = getattr(model, "get_classifier", lambda: None)()
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise OptionError(f"head_bias: the head of model {settings.model!r} has no bias", "head_bias", "model")
        nn.init.constant_(head.bias, settings.head_bias)
    freeze(model, settings.trained)
    return model.train()


def _router(router: str, option: str) -> Any:
    from vmoe_routers.routers import ROUTERS
    from vmoe_routers.study.own import is_own, load_factory

    if is_own(router):
        return load_factory(router, option)
    if router not in ROUTERS:
        raise OptionError(
            f"{option} {router!r} does not exist; there are {', '.join(ROUTERS)}, and package.module:factory"
            f"{did_you_mean(router, ROUTERS)}",
            option,
        )
    return router


def check_groups(model: nn.Module, settings: TrainSettings, world: World) -> None:
    """Checks that each part of a batch on a process consists of whole groups.

    Raises:
        OptionError: The group size of a layer does not divide the images that run together.
    """
    images = settings.batch_size // world.size // settings.accumulate
    for layer in model.modules():
        if isinstance(layer, MoEMlp) and images % layer.group_size:
            raise OptionError(
                f"group_size {layer.group_size} must divide {images}, the number of images that run together: "
                f"batch_size {settings.batch_size}, processes {world.size}, accumulate {settings.accumulate}",
                "group_size",
                "batch_size",
            )


def lay_out(model: nn.Module, settings: TrainSettings, world: World) -> nn.Module:
    """Moves the model to the device of this process, and distributes it over the processes.

    Raises:
        OptionError: The number of processes or the model does not fit the settings.
    """
    model = model.to(world.device)
    if settings.parallel == "fsdp" and world.size > 1:
        if settings.precision == "float16":
            raise OptionError(
                "precision 'float16' needs loss scaling, which parallel 'fsdp' does not support; wanted 'bfloat16'",
                "precision",
                "parallel",
            )
        try:
            meshes = Meshes.make(world.device.type, replicate=settings.replicate, ep=settings.ep)
            return parallelize(
                model,
                meshes,
                param_dtype=DTYPES[settings.precision],
                checkpointing=settings.checkpointing,  # type: ignore[arg-type]
                compile=settings.compile,
            )
        except (TypeError, ValueError) as error:
            raise OptionError(f"parallel 'fsdp': {error}", "parallel") from error
    for name in ("replicate", "ep"):
        if getattr(settings, name) > 1:
            raise OptionError(
                f"{name} {getattr(settings, name)} needs parallel 'fsdp' and several processes: "
                "torchrun --nproc-per-node 8 -m vmoe_routers train ...",
                name,
            )
    if settings.checkpointing != "none":
        if not hasattr(model, "set_grad_checkpointing"):
            raise OptionError(f"checkpointing needs a model of timm, got {type(model).__name__}", "checkpointing")
        model.set_grad_checkpointing(True)  # type: ignore[operator]
    if settings.compile:
        for block in getattr(model, "blocks", [model]):
            block.compile()
    if world.size == 1:
        return model
    return DistributedDataParallel(model, [world.device] if world.device.type == "cuda" else None)
