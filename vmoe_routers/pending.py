"""The auxiliary loss of a model: its way from the layers' forwards to the training loss.

docs/auxiliary_losses.md explains the design.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable


class _Claim:
    """A value that `aux_loss` returned, as long as its graph exists."""

    __slots__ = ("__weakref__", "losses", "time")

    def __init__(self, losses: list[_Loss]):
        self.losses = losses
        self.time = time.monotonic_ns()


class _Loss:
    """The auxiliary loss of a forward, until a backward pass has used it.

    Attributes:
        value: a scalar, with its graph unless the forward is run again in backward.
        groups, replica: the groups of the forward, and whether a replica of nn.DataParallel ran it.
        scale: the gradient that `aux_loss` got, for a forward that is run again.
        claim: the value of `aux_loss` that counts this loss.
    """

    __slots__ = ("__weakref__", "claim", "groups", "replica", "scale", "value")

    def __init__(self, value: Tensor, groups: int = 1, replica: bool = False):
        self.value: Tensor | None = value
        self.groups = groups
        self.replica = replica
        self.scale: Tensor | None = None
        self.claim: weakref.ref[_Claim] | None = None

    @property
    def claimed(self) -> _Claim | None:
        return None if self.claim is None else self.claim()

    def end(self) -> None:
        self.value = None


class _Output:
    """A hook on the node of a layer's output, which lives as long as the graph of that output."""

    __slots__ = ("__weakref__", "loss")

    def __init__(self, loss: _Loss):
        self.loss = loss

    def __call__(self, grads: object) -> None:
        self.loss.end()


class PendingLosses:
    """The losses that the training forwards of one layer left for `aux_loss`. Copies and pickles start empty.

    Attributes:
        repeated: the losses of forwards that a re-entrant checkpoint will run again.
        compiled: the sum of the losses of compiled forwards. A compiled graph can add to a tensor even within a
            checkpointed region, where it can set no attribute.
        time, previous: when the layer ran last, and when before; -1: never.
    """

    def __init__(self) -> None:
        self.repeated: list[_Loss] = []
        self.compiled = torch.zeros(())
        self.time = self.previous = -1
        self._taken: list[_Loss] = []
        self._outputs: list[weakref.ref[_Output]] = []
        self._last: _Loss | None = None

    def add(self, y: Tensor, loss: Callable[[], Tensor], groups: int, replica: bool) -> Tensor:
        """Keeps the loss of a training forward with output `y`.

        Returns:
            `y`, whose backward may also bring the loss its gradient.
        """
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and not torch.compiler.is_exporting():
                self.compiled.add_(loss())
        elif torch._C._current_graph_task_id() != -1:
            # In a backward pass: a checkpoint runs its region again. One that is not re-entrant restores what the loss
            # of the first pass saved, so the loss is computed again too. One that is re-entrant threw that loss away.
            if torch.is_grad_enabled():
                value = loss()
                first_pass = self.repeated.pop() if self.repeated else None
                if first_pass is not None and first_pass.scale is not None:
                    return _Inject.apply(y, value, first_pass.scale)
        elif torch.is_grad_enabled():
            if y.grad_fn is not None:
                self._keep(y.grad_fn, _Loss(loss(), groups, replica))
        elif not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
            # The first pass of a re-entrant checkpoint: within an autograd.Function both modes of differentiation
            # are off, within torch.no_grad only one is.
            self.repeated.append(_Loss(loss().detach(), groups, replica))
        return y

    def _keep(self, node: torch.autograd.graph.Node, loss: _Loss) -> None:
        output = _Output(loss)
        node.register_prehook(output)  # type: ignore[arg-type]
        self._outputs = [ref for ref in self._outputs if ref() is not None]
        self._outputs.append(weakref.ref(output))
        self._last = loss
        self.previous, self.time = self.time, time.monotonic_ns()

    def losses(self) -> list[_Loss]:
        """The unused losses: of outputs that exist, of the last forward, of repeated and of compiled forwards."""
        losses = [output.loss for ref in self._outputs if (output := ref()) is not None]
        if self._last is not None and self._last not in losses:
            losses.append(self._last)
        losses += self.repeated + self._compiled()
        return [loss for loss in losses if loss.value is not None]

    def forget_before(self, since: int) -> None:
        """Drops the loss of the last forward if it ran before `since`; it still counts while its output exists."""
        if self.time < since:
            self._last = None

    def _compiled(self) -> list[_Loss]:
        self._taken = [loss for loss in self._taken if loss.value is not None]
        if not self.compiled.requires_grad:
            return self._taken
        # The sum's node follows the node of the compiled graph, through which a backward pass of the output goes.
        nodes = [node for node, _ in cast(Any, self.compiled.grad_fn).next_functions if node is not None]
        if any(map(_used, nodes)):
            self.reset_compiled()
            return self._taken
        loss = _Loss(self.compiled)
        if not torch.is_grad_enabled():
            return [*self._taken, loss]
        for node in nodes:
            node.register_prehook(lambda grads: loss.end())
        self._taken.append(loss)
        self.reset_compiled()
        return self._taken

    def reset_compiled(self) -> None:
        """Starts the sum of the compiled forwards again."""
        self.compiled = torch.zeros((), device=self.compiled.device)

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Follows the layer to another device."""
        self.compiled = torch.zeros((), device=fn(self.compiled.detach()).device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start empty: a graph can be neither copied nor pickled."""
        return PendingLosses, ()


def _used(node: Any) -> bool:
    """Whether a backward pass has freed what the node of a compiled graph saved."""
    try:
        node.saved_tensors  # noqa: B018  (raises where they are freed)
    except AttributeError:
        return False
    except RuntimeError:
        return True
    return False


class _Inject(torch.autograd.Function):
    """The output unchanged; in backward the loss gets the gradient that `aux_loss` got."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale.to(loss)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.scale, None


class _Deliver(torch.autograd.Function):
    """A sum of the losses of repeated forwards, to whom backward hands its gradient.

    These forwards run again later in the same backward pass: autograd runs the nodes that were made last first.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, values: list[Tensor], losses: list[_Loss]) -> Tensor:
        ctx.losses = losses
        return total + sum(value.to(total) for value in values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        for loss in ctx.losses:
            loss.scale = grad if loss.scale is None else loss.scale + grad
        return grad, None, None


def total_loss(model: nn.Module, layers: list[PendingLosses]) -> Tensor:
    """The sum of the layers' losses, a scalar on the device of the model's first parameter."""
    parameter = next(model.parameters(), None)
    total = torch.zeros((), device=None if parameter is None else parameter.device)
    if torch.compiler.is_compiling():
        for layer in layers:
            total = total + layer.compiled.to(total.device)
            layer.reset_compiled()
        return total
    # The last forward of a layer counts without its output too, unless it belongs to a forward of the model that was
    # abandoned for a newer one. Layers run in order: an earlier layer that ran since began a newer one, and so did a
    # later layer that ran twice since. From the last layer on, because its loss holds the outputs of earlier ones.
    for i, layer in reversed(list(enumerate(layers))):
        newer = [before.time for before in layers[:i]] + [after.previous for after in layers[i + 1 :]]
        layer.forget_before(max(newer, default=-1))
    pending = [layer.losses() for layer in layers]
    # A loss counts once: in the first value that was read after its forward, as long as that value exists. Until
    # another forward runs, the same losses are read again.
    claims = {loss.claimed for losses in pending for loss in losses}
    wanted = None if None in claims or not claims else max(filter(None, claims), key=lambda claim: claim.time)
    chosen = [[loss for loss in losses if loss.claimed is wanted] for losses in pending]
    for losses in chosen:
        values = _values(losses)
        repeated = [loss for loss in losses if loss.value is not None and not loss.value.requires_grad]
        for loss, value in zip(losses, values, strict=True):
            if loss not in repeated:
                total = total + value.to(total.device)
        if repeated:
            values = [value for loss, value in zip(losses, values, strict=True) if loss in repeated]
            total = _Deliver.apply(total.clone().requires_grad_(torch.is_grad_enabled()), values, repeated)
    if not torch.is_grad_enabled():
        return total.detach()
    if total.requires_grad:
        claim = _Claim([loss for losses in chosen for loss in losses])
        for loss in claim.losses:
            if loss.claimed is None:
                loss.claim = weakref.ref(claim)

        def end(grad: Tensor) -> None:
            for loss in claim.losses:
                loss.end()
            # A checkpoint around a compiled region runs it again in this pass, and so adds to the sums again.
            Variable._execution_engine.queue_callback(lambda: [layer.reset_compiled() for layer in layers])  # type: ignore[attr-defined]

        total.register_hook(end)
    return total


def _values(losses: list[_Loss]) -> list[Tensor]:
    """The values of the losses of a layer; those of nn.DataParallel's replicas weighted to means over all groups."""
    replicas = [loss for loss in losses if loss.replica]
    groups = sum(loss.groups for loss in replicas)
    devices = [loss.value.device for loss in replicas if loss.value is not None]
    forwards = max(map(devices.count, devices)) if len(set(devices)) > 1 else 1
    values = [cast(Tensor, loss.value) for loss in losses]
    return [
        value * (forwards * loss.groups / max(groups, 1)) if loss.replica else value
        for loss, value in zip(losses, values, strict=True)
    ]
