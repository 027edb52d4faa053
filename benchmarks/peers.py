"""Installed packages beside ours, with our weights put in. One that is not installed is skipped, which the output
says: `pip install soft-moe-pytorch mixture-of-experts POT` before a run to keep.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.case import Variant
from vmoe_routers import MoEMlp


class NotComparable(Exception):
    """The package cannot be brought to compute what ours does at this size."""


def add(variants: list[Variant], skipped: list[str], make: Callable[..., Variant], *args: object) -> None:
    """The peer's variant, or a line that says why it is not there."""
    try:
        variants.append(make(*args))
    except ImportError as error:
        skipped.append(f"{make.__name__}: not installed ({error.name or error})")
    except NotComparable as error:
        skipped.append(f"{make.__name__}: {error}")


def pot_sinkhorn(logits: Tensor, iterations: int) -> Variant:
    """POT's Sinkhorn-Knopp on torch tensors: the same iterations in the same order."""
    import ot

    rows = logits.new_ones(logits.shape[1])
    columns = torch.full_like(logits[0, 0], logits.shape[1] / logits.shape[2]).detach()

    def call():
        return [ot.sinkhorn(rows, columns, -logits[0], 1.0, numItermax=iterations, stopThr=0, warn=False)[None]]

    return Variant("POT sinkhorn", "peer", call, leaves=(logits,))


def pot_ksparse(similarity: Tensor, k: int, iterations: int) -> Variant:
    """POT's sparsity-constrained semi-dual, solved by SciPy's L-BFGS-B in float64."""
    from ot.smooth import smooth_ot_semi_dual

    T, E = similarity.shape[1:]
    if similarity.device.type != "cpu":
        raise NotComparable("NumPy only")
    cost = -similarity[0].double().numpy()
    rows, columns = torch.ones(T).double().numpy(), torch.full((E,), T / E).double().numpy()

    def call():
        plan = smooth_ot_semi_dual(
            rows, columns, cost, 1.0, "sparsity_constrained", max_nz=k, stopThr=1e-3, numItermax=iterations
        )
        return [torch.from_numpy(plan)[None]]

    return Variant(
        "POT smooth_ot_semi_dual", "peer", call, different="its own line search and stop, at most as many iterations"
    )


def soft_moe_pytorch(layer: MoEMlp, x: Tensor) -> Variant:
    """lucidrains' SoftMoE, whose RMS norm changes nothing for tokens of length sqrt(D)."""
    from soft_moe_pytorch import SoftMoE

    router, experts = layer.router, layer.experts
    D, E, C = router.phi.shape
    F = experts.w1.shape[2]
    if F % D:
        raise NotComparable("its hidden width is a multiple of the width")
    peer = SoftMoE(D, num_experts=E, num_slots=C, expert_mult=F // D, offload_unused_experts_to_cpu=False).to(x.device)
    with torch.no_grad():
        peer.slot_norm.gamma.fill_(router.scale.item() / D)  # both of its norms multiply by sqrt(D)
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
    """lucidrains' MoE with top-2 gating, second choices always taken, and our capacity."""
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
