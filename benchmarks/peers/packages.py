"""Layers and ops of installed packages, with our weights.

The output names packages that are not installed. `pip install -e '.[bench]'` installs all packages. Blocks of
transformers are in `benchmarks.peers.hugging_face`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from benchmarks.case import Variant
from vmoe_routers import MoEMlp


class NotComparable(Exception):
    """The package cannot compute our function at this size."""


def add(variants: list[Variant], skipped: list[str], make: Callable[..., Variant], *args: object) -> None:
    """Adds the variant that `make` makes, or a line with the reason why it is skipped."""
    try:
        variants.append(make(*args))
    except ImportError as error:
        skipped.append(f"{make.__name__}: not installed ({error.name or error})")
    except NotComparable as error:
        skipped.append(f"{make.__name__}: {error}")


def _silent() -> contextlib.AbstractContextManager[object]:
    """Suppresses the output of POT 0.9.7, which prints a shape in every k-sparse projection."""
    return contextlib.redirect_stdout(io.StringIO())


def pot_sinkhorn(logits: Tensor, iterations: int) -> Variant:
    """Makes POT's Sinkhorn on torch tensors, with the same iterations in the same order."""
    import ot

    rows = logits.new_ones(logits.shape[1])
    columns = torch.full_like(logits[0, 0], logits.shape[1] / logits.shape[2]).detach()

    def call():
        return [ot.sinkhorn(rows, columns, -logits[0], 1.0, numItermax=iterations, stopThr=0, warn=False)[None]]

    return Variant("POT sinkhorn", "peer", call, leaves=(logits,))


def pot_ksparse(similarity: Tensor, k: int, iterations: int) -> Variant:
    """Makes POT's sparsity-constrained semi-dual, which SciPy's L-BFGS-B solves in float64."""
    from ot.smooth import smooth_ot_semi_dual

    T, E = similarity.shape[1:]
    if similarity.device.type != "cpu":
        raise NotComparable("NumPy only")
    cost = -similarity[0].double().numpy()
    rows, columns = torch.ones(T).double().numpy(), torch.full((E,), T / E).double().numpy()

    def call():
        with _silent():
            plan = smooth_ot_semi_dual(
                rows, columns, cost, 1.0, "sparsity_constrained", max_nz=k, stopThr=1e-3, numItermax=iterations
            )
        return [torch.from_numpy(plan)[None]]

    return Variant(
        "POT smooth_ot_semi_dual", "peer", call, different="its own line search and stop, at most as many iterations"
    )


def pot_projection(x: Tensor, k: int) -> Variant:
    """Makes POT's projection of the rows of a matrix, in NumPy."""
    from ot.utils import projection_sparse_simplex

    if x.device.type != "cpu":
        raise NotComparable("NumPy only")
    rows = x.detach().flatten(0, 1).numpy()

    def call():
        with _silent():
            return [torch.from_numpy(projection_sparse_simplex(rows, k, axis=1)).to(x.dtype).view_as(x)]

    return Variant("POT projection_sparse_simplex", "peer", call)


def runs_triton(device: str) -> bool:
    return device == "cuda"


def triton_topk(logits: Tensor, k: int) -> Variant:
    from benchmarks.peers import triton

    # No leaves: this form has no backward.
    return Variant("triton", "peer", lambda: triton.softmax_topk(logits, k))


def triton_gather(x: Tensor, slots: Sequence[int], rows: Tensor) -> Variant:
    """Makes dispatch: `slots` is [G, E, C]. `rows` has the row of every slot, n for an empty slot."""
    from benchmarks.peers import triton

    return Variant("triton", "peer", lambda: [triton.gather_rows(x.flatten(0, 1), rows).view(*slots, -1)])


def triton_sum_slots(y: Tensor, gate: Tensor, places: Tensor, shape: Sequence[int]) -> Variant:
    """Makes combine to tokens of `shape`: y [S, D]; slots of every token `places` [n, K], -1 for dropped requests."""
    from benchmarks.peers import triton

    return Variant("triton", "peer", lambda: [triton.sum_slots(y, gate.flatten(), places).view(shape)])


def triton_rows(x: Tensor, slots: Sequence[int], gate: Tensor, rows: Tensor, places: Tensor) -> Variant:
    """Makes dispatch and combine, from `triton_gather` and `triton_sum_slots`."""
    from benchmarks.peers import triton

    def call():
        y = triton.gather_rows(x.flatten(0, 1), rows)
        return [triton.sum_slots(y, gate.flatten(), places).view_as(x), y.view(*slots, -1)]

    return Variant("triton", "peer", call)


def soft_moe_pytorch(layer: MoEMlp, x: Tensor) -> Variant:
    """Makes lucidrains' SoftMoE, whose RMS norm changes nothing for tokens of length sqrt(D)."""
    from soft_moe_pytorch import SoftMoE

    router, experts = layer.router, layer.experts
    D, E, C = router.phi.shape
    F = experts.w1.shape[2]
    if F % D:
        raise NotComparable("its hidden width must be a multiple of the width")
    peer = SoftMoE(D, num_experts=E, num_slots=C, expert_mult=F // D, offload_unused_experts_to_cpu=False).to(x)
    with torch.no_grad():
        peer.slot_norm.gamma.fill_(router.scale.item() / D)  # both norms of the package multiply by sqrt(D)
        peer.slot_embeds.copy_(router.phi.permute(1, 2, 0))
        for i, expert in enumerate(peer.experts.experts):
            for linear, weight, bias in ((expert[0], experts.w1, experts.b1), (expert[3], experts.w2, experts.b2)):
                linear.weight.copy_(weight[i].T)
                linear.bias.copy_(bias[i])
    return Variant(
        "soft-moe-pytorch",
        "peer",
        lambda: [peer(x)],
        leaves=(x, *peer.parameters()),
        different_gradient="its norm of the tokens is inside",
    )


def mixture_of_experts(layer: MoEMlp, x: Tensor, capacity: int) -> Variant:
    """Makes lucidrains' MoE with top-2 gating, which always takes second choices, and our capacity."""
    from mixture_of_experts import MoE

    T, E = x.shape[1], layer.router.num_experts
    factor = 2.0
    if max(4, min(T, int(T * factor / E))) != capacity:
        raise NotComparable(f"its capacity is not {capacity} here")
    peer = MoE(
        x.shape[2],
        num_experts=E,
        hidden_dim=layer.experts.w1.shape[2],
        activation=nn.GELU,
        second_policy_eval="all",
        capacity_factor_eval=factor,
    )
    peer = peer.to(x.device).eval()
    with torch.no_grad():
        peer.gate.w_gating.copy_(layer.router.weight.T)
        peer.experts.w1.copy_(layer.experts.w1)
        peer.experts.w2.copy_(layer.experts.w2)
    return Variant(
        "mixture-of-experts",
        "peer",
        lambda: [peer(x)[0]],
        leaves=(x, peer.gate.w_gating, peer.experts.w1, peer.experts.w2),
        canonical_gradients=lambda grads: [grads[0], grads[1].T, grads[2], grads[3]],
    )


def st_moe_pytorch(layer: MoEMlp, x: Tensor, capacity: int) -> Variant:
    """Makes lucidrains' ST-MoE with top-2 gating, which always takes second choices, and with experts like ours."""
    from st_moe_pytorch import MoE

    T, D = x.shape[1:]
    E, _, F = layer.experts.w1.shape
    factor = 2.0
    if max(4, min(T, int(T * factor / E))) != capacity:
        raise NotComparable(f"its capacity is not {capacity} here")
    mlps = [nn.Sequential(nn.Linear(D, F, bias=False), nn.GELU(), nn.Linear(F, D, bias=False)) for _ in range(E)]
    peer = MoE(
        D,
        num_experts=E,
        threshold_eval=0.0,
        capacity_factor_eval=factor,
        experts=nn.ModuleList(mlps),
        straight_through_dispatch_tensor=False,  # True would change the gradient and add work
    )
    peer = peer.to(x.device).eval()
    with torch.no_grad():
        peer.gate.to_gates.weight.copy_(layer.router.weight)
        for i, mlp in enumerate(mlps):
            mlp[0].weight.copy_(layer.experts.w1[i].T)
            mlp[2].weight.copy_(layer.experts.w2[i].T)
    return Variant(
        "st-moe-pytorch",
        "peer",
        lambda: [peer(x)[0]],
        leaves=(x, peer.gate.to_gates.weight, *(m[0].weight for m in mlps), *(m[2].weight for m in mlps)),
        canonical_gradients=lambda grads: [*grads[:2], *stacked(grads[2:])],
    )


def stacked(grads: Sequence[Tensor]) -> list[Tensor]:
    """Stacks the weight gradients of E first and E second Linear layers to our layouts, [E, D, F] and [E, F, D]."""
    E = len(grads) // 2
    return [torch.stack([g.T for g in grads[:E]]), torch.stack([g.T for g in grads[E:]])]
