"""Made-up run records of the study, for tests of the code that reads them."""

from __future__ import annotations

import math
import random
from typing import Any

MACHINE = {"CPU": "A <fast> one", "cores": "2 used of 2"}
TITLES = {
    "softmax_token_choice": "Softmax Token Choice",
    "sinkhorn_token_choice": "Sinkhorn Token Choice",
    "softmax_expert_choice": "Softmax Expert Choice",
    "sinkhorn_expert_choice": "Sinkhorn Expert Choice",
    "sparsity_constrained_expert_choice": "Sparsity-constrained Expert Choice",
    "soft": "Soft MoE",
}


def variant(router: str | None, top_k: int | None = None, combine: str | None = None, capacity: float = 1.0) -> dict:
    if router is None:
        return {"name": "dense", "label": "Dense ViT"} | dict.fromkeys(
            ("router", "top_k", "combine", "batch_priority", "capacity_factor", "ablation", "arm")
        )
    parts = [router] + [f"k{top_k}"] * bool(top_k) + ["plan"] * (combine == "plan") + [f"c{capacity:g}"]
    label = (
        TITLES[router]
        + f", K={top_k}" * bool(top_k)
        + ", plan" * (combine == "plan")
        + f", {capacity:g}x" * (capacity != 1)
    )
    return {
        "name": "-".join(parts),
        "label": label,
        "router": router,
        "top_k": top_k,
        "combine": combine,
        "batch_priority": False if top_k else None,
        "capacity_factor": capacity,
        "ablation": None,
        "arm": None,
    }


def variants(capacities: tuple[float, ...] = (1.0,)) -> list[dict]:
    made = [variant(None)]
    for capacity in capacities:
        made += [variant("softmax_token_choice", k, None, capacity) for k in (1, 2)]
        made += [variant("sinkhorn_token_choice", k, c, capacity) for k in (1, 2) for c in ("softmax", "plan")]
        made += [variant(router, capacity=capacity) for router in list(TITLES)[2:5]]
        made += [variant("soft", capacity=capacity)]
    return made


def run(variant: dict, seed: int = 0, epochs: int = 20, transfer: bool = False, experts: int = 8) -> dict[str, Any]:
    """Makes a record with plausible numbers. They differ between variants and seeds, and are the same at every call."""
    trunk, own = random.Random(seed), random.Random(f"{variant['name']} {seed}")
    skill = random.Random(variant["name"]).uniform(0.0, 0.03) + trunk.gauss(0, 0.01) + own.gauss(0, 0.004)
    capacity = variant["capacity_factor"] or 1.0
    work = capacity * (variant["top_k"] or 1)
    second = 1.4 if variant["router"] is None else (1.6 + 0.5 * work + own.uniform(0, 0.1))
    curve = []
    for epoch in range(1, epochs + 1):
        rest = math.exp(-epoch / 4) + 0.06 - skill + own.gauss(0, 0.004)
        curve.append(
            {
                "epoch": epoch,
                "seconds": second * epoch,
                "train_loss": 2.3 * rest,
                "accuracy": 1 - 0.9 * rest,
                "loss": 2.3 * rest,
            }
        )
    return {
        "variant": variant,
        "seed": seed,
        "settings": {"options": {}, "scale_init": 16.0},
        "epochs": curve,
        "final": {key: curve[-1][key] for key in ("accuracy", "loss")},
        "diverged": None,
        "steps": 11 * epochs,
        "timing": {"step_ms": _step_ms(variant["name"], work), "machine": MACHINE, "date": "2024-02-29 13:00 UTC"},
        "cost": {
            "slots": 16.0 * work,
            "mlp_flops": 1.05e6 * (1 + work) / 2 if variant["router"] else 1.0e6,
            "flops": 2.5e6 + (1.05e6 * (1 + work) / 2 if variant["router"] else 1.0e6),
            "parameters": 412_000.0 if variant["router"] else 120_000.0,
        },
        "layers": [_layer(block, own, experts, variant) for block in (2, 3)] if variant["router"] else [],
        "transfer": {"data": "fashion-mnist", "accuracy": 0.55 + 3 * skill} if transfer else None,
        "machine": MACHINE,
        "date": f"2024-02-29 12:0{seed} UTC",
    }


def _step_ms(name: str, work: float) -> list[float]:
    """Makes the times of the rounds of the timing, equal for every seed. In a round, each variant runs once."""
    own = random.Random(name)
    return [(9.0 + 3.0 * work) * own.uniform(0.9, 1.1) for _ in range(9)]


def _layer(block: int, own: random.Random, experts: int, variant: dict) -> dict:
    uneven = 0.0 if variant["router"] == "soft" else 0.4
    load = [2.0 * math.exp(uneven * own.gauss(0, 1)) for _ in range(experts)]
    return {
        "block": block,
        "load": load,
        "utilisation": own.uniform(0.8, 1.0),
        "load_cv": own.uniform(0.0, 0.5),
        "dropped": own.uniform(0.0, 0.2) if variant["router"] != "soft" else 0.0,
        "entropy": own.uniform(1.0, 2.0),
        "dead_experts": int(own.random() < 0.2),
    }


def study(seeds: int = 3, transfer: bool = False, capacities: tuple[float, ...] = (1.0,)) -> list[dict]:
    return [run(v, seed, transfer=transfer) for v in variants(capacities) for seed in range(seeds)]


# The loss by router and weight of the auxiliary losses. The comparison has the runs of a router's default weight.
_LOSSES = {
    ("softmax_expert_choice", "aux_loss", "0"): {"0": 0.60, "0.005": 0.57, "0.05": 0.54},
    ("softmax_token_choice", "aux_loss_token_choice", "0.005"): {"0": 0.61, "0.005": 0.58, "0.05": 0.56},
}
NOISE = [0.0001, -0.0002, 0.0003, 0.0]
"""Noise on the loss of Softmax Token Choice in `at_weights`, by seed."""
_DROPPED = {"softmax_expert_choice": 0.3, "softmax_token_choice": 0.5}  # with the weight 0


def at_weights(seeds: int = 4) -> list[dict[str, Any]]:
    """Makes runs of Softmax Expert Choice and Token Choice at all weights of the auxiliary losses."""
    made = []
    for seed in range(seeds):
        for (router, ablation, default), losses in _LOSSES.items():
            base = variant(router, 1 if router == "softmax_token_choice" else None)
            for weight, loss in losses.items():
                changed = {"name": f"{base['name']}-{weight}", "ablation": ablation, "arm": weight}
                record = run(base | ({} if weight == default else changed), seed)
                noise = NOISE[seed] * (router == "softmax_token_choice")
                record["final"] |= {"loss": loss + noise, "accuracy": 0.75 + 10 * noise}
                for layer in record["layers"]:
                    layer["dropped"] = _DROPPED[router] - float(weight)
                made.append(record)
    return made
