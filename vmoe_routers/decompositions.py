"""Decompositions of the ops into plain PyTorch, to export models to other runtimes such as ONNX.

    import torch
    from vmoe_routers.decompositions import DECOMPOSITIONS
    from vmoe_routers.models import vit_moe

    model = vit_moe(32, 8, embed_dim=64, depth=4, num_heads=4, num_classes=10, router="soft", num_experts=8).eval()
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (torch.randn(4, 3, 32, 32),), dynamic_shapes={"x": {0: batch}})
    program = program.run_decompositions(DECOMPOSITIONS)
    torch.onnx.export(program, dynamo=True).save("model.onnx")

With a `group_size` above 1, the dynamic shape is ``{0: group_size * batch}``.

Most decompositions are the definitions of the ops in `vmoe_routers.ops.reference`. All keep the contract of their op in
every runtime: ties go to the lower index, NaN counts as the largest value, and -inf marks a masked entry.
Decompositions are for inference, and slower than the kernels: a selection takes two sorts, and experts compute their
empty slots, too. Sinkhorn and the transport solver are unrolled in float64 and always run all iterations. A converged
group keeps its result. The runtime computes the softmax, so gates that differ in the last bit in torch may be equal in
the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vmoe_routers.experts import GELU, by_products
from vmoe_routers.ops import reference


def _for_gradient(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Makes a placeholder of NaN for an output that only backward reads. Any other use makes the result NaN."""
    return like.new_full(shape, math.nan, dtype=dtype)


def _softmax_gather(logits: Tensor, indices: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    return reference.softmax_gather(logits, indices, dim), _for_gradient(logits, 2, *logits.shape[:2])


def _softmax_topk(logits: Tensor, k: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    return *reference.softmax_topk(logits, k, dim), _for_gradient(logits, 2, *logits.shape[:2])


def _assign_slots(expert: Tensor, priority: Tensor | None, num_experts: int, capacity: int) -> tuple[Tensor, Tensor]:
    return reference.assign_slots(expert, num_experts, capacity, priority)


def _sinkhorn(
    logits: Tensor, epsilon: float, iterations: int, tolerance: float, implicit: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan, error, steps = reference.sinkhorn(
        logits.double(), epsilon=epsilon, iterations=iterations, tolerance=tolerance or None, return_error=True
    )
    groups, _, experts = logits.shape
    history = _for_gradient(logits, groups, iterations, experts, dtype=torch.float64)
    return plan.to(logits.dtype), history, error, steps


def _ksparse_projection(x: Tensor, k: int) -> Tensor:
    """Computes `reference.ksparse_projection` without a full sort: entries are compared with the k-th largest value."""
    projects = (x < math.inf).all(-1, keepdim=True) & (x > -math.inf).any(-1, keepdim=True)
    x = x - x.amax(-1, keepdim=True)
    largest = x.topk(k).values
    last = largest[..., -1:]
    above, level = x > last, x == last
    # Entries equal to the k-th value: the lower indices fill the remaining places.
    chosen = above | (level & (level.long().cumsum(-1) <= k - above.long().sum(-1, keepdim=True)))
    p = torch.where(chosen, (x - reference.simplex_threshold(largest)).relu(), 0)
    return torch.where(projects, p, math.nan)


def _ksparse_transport(
    similarity: Tensor,
    k: int,
    iterations: int,
    solver: str,
    learning_rate: float,
    tolerance: float,
    gamma: float,
) -> Tensor:
    if solver != "adam":
        raise NotImplementedError(f"ksparse_transport: solver {solver!r} has no decomposition, wanted 'adam'")
    plan = reference.ksparse_transport(
        similarity.double(),
        k,
        iterations=iterations,
        learning_rate=learning_rate,
        tolerance=tolerance,
        gamma=gamma,
        project=_ksparse_projection,
    )
    return plan.to(similarity.dtype)


def _grouped_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    filled: Tensor | None,
    act: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    hidden = _for_gradient(x, x.shape[0], x.shape[1] if save else 0, w1.shape[2])
    return by_products(x, w1, b1, w2, b2, filled, GELU[act]), hidden


def _stable_sort(
    x: Tensor, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """Sorts stably by two sorts that need not be stable: torch's ONNX exporter has no stable sort.

    The first sort finds equal entries. The second orders them by index. NaN is replaced by infinity in the first sort,
    because runtimes differ in their order of NaN.
    """
    x = x.movedim(dim, -1)
    comparable, last = x, None
    if x.is_floating_point():
        nan = x.isnan()
        comparable = x.masked_fill(nan, math.inf)
        last = (nan ^ descending).long()  # NaN is sorted after infinity; if descending, before
    ordered, place = comparable.sort(dim=-1, descending=descending)
    before = torch.cat([ordered[..., :1], ordered[..., :-1]], -1)
    key = (ordered != before).long().cumsum(-1)
    if last is not None:
        key = 2 * key + last.gather(-1, place)
    # All keys differ now.
    indices = place.gather(-1, (key * x.shape[-1] + place).sort(dim=-1).indices)
    return x.gather(-1, indices).movedim(-1, dim), indices.movedim(-1, dim)


def _laid_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the results of `function` contiguous, as ops do. Later nodes of a program may rely on contiguous inputs."""

    def decomposition(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return tuple(x.contiguous() for x in result) if isinstance(result, tuple) else result.contiguous()

    return decomposition


_ops = torch.ops.vmoe_routers

DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    op.default: _laid_out(function)
    for op, function in (
        (_ops.topk, reference.topk),
        (_ops.softmax_gather, _softmax_gather),
        (_ops.softmax_topk, _softmax_topk),
        (_ops.assign_slots, _assign_slots),
        (_ops.invert_slots, reference.invert_slots),
        (_ops.dispatch, reference.dispatch),
        (_ops.combine, reference.combine),
        (_ops.sinkhorn, _sinkhorn),
        (_ops.ksparse_projection, _ksparse_projection),
        (_ops.ksparse_transport, _ksparse_transport),
        (_ops.soft_logits, reference.soft_logits),
        (_ops.soft_mix, reference.soft_mix),
        (_ops.grouped_mlp, _grouped_mlp),
    )
} | {torch.ops.aten.sort.stable: _stable_sort}
"""Table for `torch.export.ExportedProgram.run_decompositions`: all forward ops, and the stable sort that they use."""
