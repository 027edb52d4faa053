"""Keeps auxiliary losses from the forwards of the layers until the training loss is computed.

docs/auxiliary_losses.md explains the design.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from vmoe_routers.ops._checks import exporting

_TICKS = itertools.count()
"""Counter that orders forwards and readings. A clock may give two events the same time."""


class _Claim:
    """Claim on the losses that a value of `aux_loss` contains. The claim exists as long as the graph of the value."""

    __slots__ = ("__weakref__", "losses", "time")

    def __init__(self, losses: list[_Loss]):
        self.losses = losses
        self.time = next(_TICKS)


class _Loss:
    """Auxiliary loss of a forward, until a backward pass has used it.

    Attributes:
        value: A scalar, with its graph unless the forward is repeated in backward. None after the backward pass.
        groups, replica: The groups of the forward, and whether a replica of nn.DataParallel ran it.
        scale: Gradient that `aux_loss` got, for a forward that a checkpoint repeats.
        claims: Claims of the values of `aux_loss` that contain this loss.
        time: Tick of the forward. For a compiled forward, tick of the first reading.
    """

    __slots__ = ("__weakref__", "claims", "groups", "replica", "scale", "time", "value")

    def __init__(self, value: Tensor, groups: int = 1, replica: bool = False):
        self.value: Tensor | None = value
        self.groups = groups
        self.replica = replica
        self.scale: Tensor | None = None
        self.time = next(_TICKS)
        self.claims: list[weakref.ref[_Claim]] = []

    @property
    def claimed(self) -> _Claim | None:
        """Last claim that still exists, or None."""
        living = [claim for ref in self.claims if (claim := ref()) is not None]
        return living[-1] if living else None

    def end(self) -> None:
        self.value = None


class _Output:
    """Hook on the node of a layer's output. The hook exists as long as the graph of that output."""

    __slots__ = ("__weakref__", "loss")

    def __init__(self, loss: _Loss):
        self.loss = loss

    def __call__(self, grads: object) -> None:
        self.loss.end()


class PendingLosses:
    """Losses of one layer's training forwards, kept for `aux_loss`. Copies and pickles start empty.

    Attributes:
        repeated: Losses of forwards that a re-entrant checkpoint will repeat.
        compiled: Sum of the losses of compiled forwards. A compiled graph in a checkpointed region can add to a tensor
            but cannot set an attribute.
        time, previous: Ticks of the last forward and of the forward before it, or -1 without such a forward.
        _taken: Losses that were moved from `compiled` when they were read, and that no backward pass has used yet.
    """

    def __init__(self) -> None:
        self.repeated: list[_Loss] = []
        self.compiled: Tensor = torch.zeros(())
        self.time: int = -1
        self.previous: int = -1
        self._taken: list[_Loss] = []
        self._handle: RemovableHandle | None = None
        self._outputs: list[weakref.ref[_Output]] = []
        self._last: _Loss | None = None

    def add(self, y: Tensor, loss: Callable[[], Tensor], groups: int, replica: bool) -> Tensor:
        """Keeps the loss of a training forward with output `y`.

        Returns:
            `y`; its backward pass may also compute the gradient of the loss.
        """
        if torch.compiler.is_compiling():
            if torch.is_grad_enabled() and not exporting():
                self.compiled.add_(loss())
        elif torch._C._current_graph_task_id() != -1:
            # A backward pass is running: a checkpoint repeats its region. A non-re-entrant checkpoint restores the
            # tensors that the loss of the first pass saved, so the loss must be computed again. A re-entrant checkpoint
            # has discarded the graph of the first pass, so its loss is injected here.
            if torch.is_grad_enabled():
                value = loss()
                first_pass = self._take_repeated()
                if first_pass is not None and first_pass.scale is not None:
                    return _Inject.apply(y, value, first_pass.scale)
        elif torch.is_grad_enabled():
            if y.grad_fn is not None:
                self._keep(y.grad_fn, _Loss(loss(), groups, replica))
        elif not torch._C._is_fwd_grad_enabled() and not torch.is_inference_mode_enabled():
            # This is the first pass of a re-entrant checkpoint: an autograd.Function disables reverse and forward mode,
            # torch.no_grad only reverse mode.
            self.repeated = [earlier for earlier in self.repeated if earlier.value is not None]
            self.repeated.append(_Loss(loss().detach(), groups, replica))
        return y

    def _take_repeated(self) -> _Loss | None:
        """Takes the loss of the forward that runs again: the last loss with a gradient, or the last loss."""
        if not self.repeated:
            return None
        # If several micro-batches are pending, the loss of the micro-batch in backward has its gradient. The loss of a
        # later micro-batch may have none.
        index = max(range(len(self.repeated)), key=lambda i: (self.repeated[i].scale is not None, i))
        return self.repeated.pop(index)

    def _keep(self, node: torch.autograd.graph.Node, loss: _Loss) -> None:
        output = _Output(loss)
        node.register_prehook(output)  # type: ignore[arg-type]
        self._outputs = [ref for ref in self._outputs if ref() is not None]
        self._outputs.append(weakref.ref(output))
        self._last = loss
        self.previous, self.time = self.time, loss.time

    def losses(self) -> list[_Loss]:
        """Lists the unused losses: of live outputs, of the last forward, and of repeated and compiled forwards."""
        losses = [output.loss for ref in self._outputs if (output := ref()) is not None]
        if self._last is not None and self._last not in losses:
            losses.append(self._last)
        losses += self.repeated + self._compiled()
        return [loss for loss in losses if loss.value is not None]

    def forget_before(self, since: int) -> None:
        """Drops the loss of the last forward if that forward ran before `since`.

        The loss still counts while the output of the forward exists.
        """
        if self.time < since:
            self._last = None

    def _compiled(self) -> list[_Loss]:
        """Moves the sum of the losses of compiled forwards, if there were any, to `_taken`. Returns `_taken`.

        With gradients disabled, the sum is returned but not moved.
        """
        self._taken = [loss for loss in self._taken if loss.value is not None]
        if not self.compiled.requires_grad:
            return self._taken
        # The node of the sum follows the node of the compiled graph, which a backward pass of the output also visits.
        nodes = _compiled_graphs(self.compiled)
        if not nodes or _used(nodes[0]):
            self.reset_compiled()
            return self._taken
        if any(map(_used, nodes[1:])):
            self.reset_compiled()
            raise RuntimeError(
                "aux_loss: a compiled layer ran again after a backward pass, but its loss was not read before that "
                "pass; read aux_loss at every step"
            )
        loss = _Loss(self.compiled)
        if not torch.is_grad_enabled():
            return [*self._taken, loss]
        nodes[0].register_prehook(lambda grads: loss.end())
        self._taken.append(loss)
        self.reset_compiled()
        return self._taken

    def end_compiled_by(self, layer: nn.Module) -> None:
        """Lets a backward pass through the parameters of `layer` end the losses of compiled forwards."""
        parameter = next((parameter for parameter in layer.parameters() if parameter.requires_grad), None)
        if parameter is None:
            return
        # Do not keep a weak reference to the parameter: Module.to cannot swap a tensor that has weak references, and
        # it swaps sharded parameters.
        hooks = parameter._post_accumulate_grad_hooks
        if self._handle is not None and hooks is not None and self._handle.id in hooks:
            return

        def end(parameter: Tensor) -> None:
            if self.compiled.requires_grad:
                self.reset_compiled()

        self._handle = parameter.register_post_accumulate_grad_hook(end)

    def reset_compiled(self) -> None:
        """Resets the sum of the compiled forwards to 0."""
        self.move(self.compiled.device)

    def move(self, device: torch.device) -> None:
        """Resets the sum of the compiled forwards to 0, on this device."""
        self.compiled = torch.zeros((), device=device)

    def __reduce__(self) -> tuple[Any, ...]:
        """Makes copies and pickles start empty, because a graph can be neither copied nor pickled."""
        return PendingLosses, ()


def _compiled_graphs(total: Tensor) -> list[Any]:
    """Lists the backward nodes of the compiled graphs that added to the sum, the last graph first.

    ``total.add_(loss)`` gives `total` a new node, with two inputs: the node of the previous sum, and the node of the
    compiled graph that computed the loss. All nodes of sums have the same name. So the function follows nodes of this
    name, and collects the other input of each node.
    """
    graphs, node = [], cast(Any, total.grad_fn)
    while node is not None:
        following = [after for after, _ in node.next_functions if after is not None]
        graphs += [after for after in following if after.name() != node.name()]
        node = next((after for after in following if after.name() == node.name()), None)
    return graphs


def _used(node: Any) -> bool:
    """Tells whether a backward pass has freed the saved tensors of a compiled graph's node."""
    try:
        node.saved_tensors  # noqa: B018  (raises if they are freed)
    except AttributeError:
        return False
    except RuntimeError:
        return True
    return False


class _Inject(torch.autograd.Function):
    """Returns the output unchanged. In backward, gives the loss the gradient that `aux_loss` got."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale.to(loss)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return grad, ctx.scale, None


class _Deliver(torch.autograd.Function):
    """Adds the losses of repeated forwards. Backward passes its gradient to these losses.

    The forwards are repeated later in the same backward pass: autograd runs the newest nodes first.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, values: Sequence[Tensor], losses: Sequence[_Loss]) -> Tensor:
        ctx.losses = losses
        return total + sum(value.to(total) for value in values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        for loss in ctx.losses:
            loss.scale = grad if loss.scale is None else loss.scale + grad
        return grad, None, None


def total_loss(model: nn.Module, modules: Sequence[Any]) -> Tensor:
    """Sums the layers' losses to a scalar on the device of the model's first parameter."""
    layers: list[PendingLosses] = [module.pending_losses for module in modules]
    parameter = next(model.parameters(), None)
    total = torch.zeros((), device=None if parameter is None else parameter.device)
    if torch.compiler.is_compiling():
        for layer in layers:
            total = total + layer.compiled.to(total.device)
            layer.reset_compiled()
        return total
    # The last forward of a layer counts even if its output was freed, unless a newer forward of the model has begun.
    # Layers run in order: a newer forward has begun if an earlier layer ran since, or a later layer ran twice since.
    # Start with the last layer, because its loss keeps the outputs of earlier layers alive.
    for i, layer in reversed(list(enumerate(layers))):
        newer = [before.time for before in layers[:i]] + [after.previous for after in layers[i + 1 :]]
        layer.forget_before(max(newer, default=-1))
    for layer, module in zip(layers, modules, strict=True):
        if layer.compiled.requires_grad:
            layer.end_compiled_by(module)
    pending = [layer.losses() for layer in layers]
    # A loss counts once: in the first value of `aux_loss` after its forward, as long as that value exists. Until
    # another forward runs, every reading returns the same losses, also a reading of a part of the model.
    newest = max((loss.time for losses in pending for loss in losses), default=-1)

    def current(loss: _Loss) -> bool:
        claim = loss.claimed
        return claim is None or claim.time > newest

    chosen = [[loss for loss in losses if current(loss)] for losses in pending]
    for losses in chosen:
        repeated: list[tuple[Tensor, _Loss]] = []
        for loss, value in zip(losses, _values(losses), strict=True):
            if value.requires_grad:
                total = total + value.to(total.device)
            else:
                repeated.append((value, loss))
        if repeated:
            total = _Deliver.apply(total.clone().requires_grad_(torch.is_grad_enabled()), *zip(*repeated, strict=True))
    if not torch.is_grad_enabled():
        return total.detach()
    if total.requires_grad:
        claim = _Claim([loss for losses in chosen for loss in losses])
        for loss in claim.losses:
            loss.claims = [ref for ref in loss.claims if ref() is not None]
            loss.claims.append(weakref.ref(claim))

        def end(grad: Tensor) -> None:
            for loss in claim.losses:
                loss.end()
            # Reset after the pass, because a checkpoint around a compiled region repeats the region and adds to the
            # sums again.
            Variable._execution_engine.queue_callback(lambda: [layer.reset_compiled() for layer in layers])  # type: ignore[attr-defined]

        total.register_hook(end)
    return total


def _values(losses: list[_Loss]) -> list[Tensor]:
    """Returns the values of a layer's losses. Replicas of nn.DataParallel are weighted to a mean over all groups."""
    replicas = [loss for loss in losses if loss.replica]
    groups = sum(loss.groups for loss in replicas)
    devices = [loss.value.device for loss in replicas if loss.value is not None]
    forwards = max(map(devices.count, devices)) if len(set(devices)) > 1 else 1
    values = [cast(Tensor, loss.value) for loss in losses]
    return [
        value * (forwards * loss.groups / max(groups, 1)) if loss.replica else value
        for loss, value in zip(losses, values, strict=True)
    ]
