"""record: collects the routings of a model's forwards."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from vmoe_routers.inspect.trace import Trace
from vmoe_routers.moe import MoEMlp
from vmoe_routers.ops._checks import Check
from vmoe_routers.routers import Routing


class _Hook:
    """Hook of `record`. Compiled code leaves the hook out. A copy or a pickle of the model gets an idle hook."""

    __slots__ = ("run",)

    def __init__(self, run: Callable[..., None]):
        self.run = run

    def __call__(self, *args: Any) -> None:
        if not torch.compiler.is_compiling():
            self.run(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_ignore,)


def _ignore(*args: Any) -> None:
    """Does nothing."""


@contextmanager
def record(model: nn.Module, *, eager: bool = True) -> Iterator[Trace]:
    """Records the routings of the forwards of `model` that this thread runs within the context.

        with vr.inspect.record(model) as trace:
            model(images)
        print(trace.layers[0].load)

    With gradients enabled, the routings keep their graph: record under ``torch.no_grad()``, or drop the trace after
    the step, to free its memory. Contexts may be nested and record independently. Forwards that activation
    checkpointing repeats in backward are not recorded. Copies and pickles of the model record nothing.

    Args:
        model: A module with MoE layers, or a `MoEMlp`, whose name is "".
        eager: True: functions of torch.compile run without compilation within the context, in all threads, because
            compiled code does not run hooks. False: they run compiled, and compiled layers are not recorded.

    Raises:
        ValueError: `model` has no MoE layer, or runs under ``torch.func.vmap``, whose tensors end with its call.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"record: model must be an nn.Module, got {type(model).__name__}")
    Check("record").flag("eager", eager)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoEMlp)}
    if not layers:
        raise ValueError(f"record: model must have a MoEMlp inside, {type(model).__name__} has none")
    trace = Trace({plain_name(name): layer.router for name, layer in layers.items()})
    thread = threading.get_ident()
    # The layer that last began, and its tokens per image. Layers may share a router.
    owner = {layer.router: (name, 0) for name, layer in zip(trace.routings, layers.values(), strict=True)}

    def recorded() -> bool:
        return threading.get_ident() == thread and torch._C._current_graph_task_id() == -1

    def begin(name: str):
        def note(layer: MoEMlp, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if recorded():
                _refuse_vmap()
                x = args[0] if args else kwargs["x"]
                owner[layer.router] = name, x.shape[1:-1].numel()

        return _Hook(note)

    def keep(router: nn.Module, args: object, routing: Routing) -> None:
        if recorded():
            trace.add(*owner[router], routing)

    handles: list[RemovableHandle] = [router.register_forward_hook(_Hook(keep)) for router in owner]
    for name, layer in zip(trace.routings, layers.values(), strict=True):
        handles.append(layer.register_forward_pre_hook(begin(name), with_kwargs=True))
    try:
        with _without_compilation() if eager else nullcontext():
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def _refuse_vmap() -> None:
    # Imported here, because this part of torch is private: if a release moves it, the rest of the package works.
    from torch._C._functorch import TransformType, get_interpreter_stack

    if any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or []):
        raise ValueError("record: the model must not run under torch.func.vmap; wanted a batch as the model takes it")


def plain_name(name: str) -> str:
    """Removes the wrappers of torch.compile, activation checkpointing and FSDP1 from the name of a module or tensor."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


_WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


# The stances of torch.compile that contexts of all threads have set, oldest first.
_stances: dict[object, Any] = {}
_stances_lock = threading.Lock()


@contextmanager
def _without_compilation() -> Iterator[None]:
    """Runs compiled functions as plain Python. The contexts of several threads may end in any order."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import would take seconds
        yield
        return
    own = object()
    with _stances_lock:
        _stances[own] = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _stances_lock:
            later = list(_stances)[list(_stances).index(own) + 1 :]
            stance = _stances.pop(own)
            if later:  # the context that began next restores the older stance when it ends
                _stances[later[0]] = stance
            else:
                stance.__exit__(None, None, None)
