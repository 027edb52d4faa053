"""MoE blocks of transformers with our weights: Switch Transformers, Mixtral, and the interface for experts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from benchmarks.case import Variant
from benchmarks.peers.packages import NotComparable, stacked
from vmoe_routers import MoEMlp

GATHERED_BYTES = 256 << 20  # the largest copy of weights, one expert per token, that is built


def transformers_switch(layer: MoEMlp, x: Tensor, capacity: int) -> Variant:
    """Makes the layer of Switch Transformers: top-1, the same capacity per sequence, experts without biases."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    experts = layer.experts
    E, D, F = experts.w1.shape
    config = SwitchTransformersConfig(
        d_model=D, d_ff=F, num_experts=E, expert_capacity=capacity, router_jitter_noise=0.0, dense_act_fn="gelu"
    )
    peer = SwitchTransformersSparseMLP(config).to(x.device).eval()
    mine = [peer.experts[f"expert_{i}"] for i in range(E)]
    with torch.no_grad():
        peer.router.classifier.weight.copy_(layer.router.weight)
        for i, expert in enumerate(mine):
            expert.wi.weight.copy_(experts.w1[i].T)
            expert.wo.weight.copy_(experts.w2[i].T)

    return Variant(
        "transformers Switch",
        "peer",
        lambda: [peer(x)],
        leaves=(x, peer.router.classifier.weight, *(e.wi.weight for e in mine), *(e.wo.weight for e in mine)),
        canonical_gradients=lambda grads: [*grads[:2], *stacked(grads[2:])],
    )


def transformers_experts(layer: MoEMlp, x: Tensor, implementation: str) -> Variant:
    """Makes Mixtral's router with Nemotron-H's experts, which are not gated. Nothing is dropped."""
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    ours, K = layer.experts, layer.router.top_k
    E, D, F = ours.w1.shape
    gathered = 4 * x.shape[0] * x.shape[1] * K * D * F
    if implementation == "batched_mm" and gathered > GATHERED_BYTES:
        raise NotComparable(f"batched_mm copies the weights of its expert for every token, {gathered >> 20} MiB here")
    config = SimpleNamespace(
        num_experts_per_tok=K,
        num_local_experts=E,
        n_routed_experts=E,
        hidden_size=D,
        moe_intermediate_size=F,
        moe_latent_size=None,
        mlp_hidden_act="gelu",
        _experts_implementation=implementation,
    )
    router, peer = MixtralTopKRouter(config).to(x.device), NemotronHExperts(config).to(x.device)
    with torch.no_grad():
        router.weight.copy_(layer.router.weight)
        peer.up_proj.copy_(ours.w1.transpose(1, 2))
        peer.down_proj.copy_(ours.w2.transpose(1, 2))
    return Variant(
        f"transformers {implementation}",
        "peer",
        _call(router, peer, x),
        leaves=(x, router.weight, peer.up_proj, peer.down_proj),
        canonical_gradients=lambda grads: [*grads[:2], *(g.transpose(1, 2) for g in grads[2:])],
    )


def transformers_mixtral(layer: MoEMlp, x: Tensor) -> Variant:
    """Makes Mixtral's block in its fastest form.

    Its three matrices have 2/3 of our hidden width, and so the FLOPs of our two matrices.
    """
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    E, D, F = layer.experts.w1.shape
    config = MixtralConfig(
        hidden_size=D,
        intermediate_size=2 * F // 3 // 4 * 4,  # grouped_mm requires rows of a multiple of 16 bytes
        num_local_experts=E,
        num_experts_per_tok=layer.router.top_k,
        experts_implementation="grouped_mm",
    )
    block = MixtralSparseMoeBlock(config).to(x.device).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=D**-0.5)
    return Variant(
        "transformers Mixtral, grouped_mm",
        "peer",
        lambda: [block(x)],
        leaves=(x, *block.parameters()),
        different="gated experts, three matrices of 2/3 the width",
    )


def _call(router: nn.Module, experts: nn.Module, x: Tensor) -> Callable[[], list[Tensor]]:
    def call():
        rows = x.flatten(0, 1)
        _, weights, index = router(rows)
        return [experts(rows, index, weights).view_as(x)]

    return call
