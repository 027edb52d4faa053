"""record: collects the routings of a model's forwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vmoe_routers.moe import MoEMlp
from vmoe_routers.routers import Routing


class Trace:
    """Routings that `record` collected.

    Attributes:
        routings: Routings of the forwards of every MoE layer in order, by the name of the layer. In eval, a batch that
            `group_size` does not divide adds two routings.
    """

    def __init__(self, names: list[str]):
        self.routings: dict[str, list[Routing]] = {name: [] for name in names}


class _Hook:
    """Hook of `record`. A copy or a pickle of the model gets a hook that does nothing."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., None]):
        self.run = run

    def __call__(self, *args: Any) -> None:
        self.run(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_ignore,)


def _ignore(*args: Any) -> None:
    """Does nothing."""


@contextmanager
def record(model: nn.Module) -> Iterator[Trace]:
    """Records the routings of the forwards of `model` that this thread runs within the context.

        with vr.inspect.record(model) as trace:
            model(images)
        print(trace.routings["blocks.3.mlp"][0].metrics)

    With gradients enabled, the routings keep their graph. Contexts may be nested and record independently. Forwards
    that activation checkpointing repeats in backward are not recorded. Record the eager model: torch.compile ignores
    hooks that are added after compilation. Copies and pickles of the model record nothing.

    Args:
        model: A module with MoE layers, or a `MoEMlp`, whose name is "".

    Raises:
        ValueError: `model` has no MoE layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record: model must be an nn.Module, got {type(model).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEMlp)}
    if not layers:
        raise ValueError(f"record: model must have a MoEMlp inside, {type(model).__name__} has none")
    trace, thread = Trace(list(layers)), threading.get_ident()

    owner = {layer.router: name for name, layer in layers.items()}  # layer that last began; layers may share a router

    def recorded() -> bool:
        return threading.get_ident() == thread and torch._C._current_graph_task_id() == -1

    def begin(router: nn.Module, name: str):
        def note(module: nn.Module, args: object) -> None:
            if recorded():
                owner[router] = name

        return _Hook(note)

    def hook(router: nn.Module):
        def keep(module: nn.Module, args: object, routing: Routing) -> None:
            if recorded():
                trace.routings[owner[router]].append(routing)

        return _Hook(keep)

    handles: list[RemovableHandle] = [router.register_forward_hook(hook(router)) for router in owner]
    shared = [(name, layer) for name, layer in layers.items() if len(owner) < len(layers)]
    handles += [layer.register_forward_pre_hook(begin(layer.router, name)) for name, layer in shared]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()
