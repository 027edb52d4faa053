"""What is to be reached, as data, and a run's verdict on it: for one thread of a CPU, float32, the default sizes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.case import BACKWARD, FORWARD, RECORDED

BEST = "best peer"  # the fastest of all that is not ours and not the dense MLP, and computes the same


@dataclass(frozen=True)
class Target:
    """`title` begins a case's title. Of `against` (a variant's name, `BEST`) the time over ours must be >= `ratio`;
    with `memory` the peak memory.
    """

    title: str
    direction: str
    against: str
    ratio: float
    memory: bool = False


@dataclass(frozen=True)
class Limit:
    """Seconds that ours may take at most."""

    title: str
    direction: str
    seconds: float


LIMITS = (
    Limit("call of ", FORWARD, 10e-6),
    Limit("call of ", RECORDED, 30e-6),
)
TARGETS = (
    Target("softmax + top-k", FORWARD, "torch softmax + topk", 15),
    Target("softmax + top-k", BACKWARD, "torch softmax + topk", 8),
    Target("expert choice, per image", FORWARD, "torch softmax + topk(dim=1)", 6),
    Target("expert choice, one group", FORWARD, "torch softmax + topk(dim=1)", 5),
    Target("slots with batch priority, one group", FORWARD, "torch stable sort", 12),
    Target("slots with batch priority, one group", FORWARD, "one-hot cumsum", 50),
    Target("Sinkhorn, one group", FORWARD, "scaling loop", 3),
    Target("Sinkhorn, one group", FORWARD, "Megatron-LM's loop", 8),
    Target("Sinkhorn, one group", FORWARD, "log domain", 20),
    Target("Sinkhorn, one group", BACKWARD, "scaling loop", 5),
    Target("Sinkhorn, one group", BACKWARD, "log domain", 12),
    Target("k-sparse transport, Adam", FORWARD, "torch topk, batched", 10),
    Target("k-sparse transport, L-BFGS", FORWARD, "POT smooth_ot_semi_dual", 10),
    Target("dispatch + combine", FORWARD, "torch gather, both ways", 4),
    Target("dispatch + combine, one group", FORWARD, "one-hot einsum", 60),
    Target("dispatch + combine", BACKWARD, "torch gather, both ways", 3),
    # ours <= 0.95 and 1.1 of the dense MLP
    Target("layer, softmax_", FORWARD, "dense MLP, same FLOPs", 1 / 0.95),
    Target("layer, softmax_", BACKWARD, "dense MLP, same FLOPs", 1 / 1.1),
    Target("layer, softmax_token_choice", FORWARD, BEST, 1.2),
    Target("layer, softmax_token_choice", BACKWARD, BEST, 1.3),
    Target("layer, soft", FORWARD, "bwconrad's form", 1.4),
    Target("layer, soft", FORWARD, "soft-moe-pytorch", 2),
    Target("layer, soft", FORWARD, "bwconrad's form", 3, memory=True),
    Target("layer, soft", FORWARD, "soft-moe-pytorch", 3, memory=True),
    Target("layer, soft", BACKWARD, "bwconrad's form", 3, memory=True),
    Target("layer, soft", BACKWARD, "soft-moe-pytorch", 3, memory=True),
)
EXACT = {"layer, soft"}  # titles that also begin others


def best_peer(result: dict) -> str | None:
    """The fastest variant beside ours that computes the same function."""
    peers = [v for v in result["variants"] if v["role"] not in ("ours", "dense", "yardstick") and not v["different"]]
    return min(peers, key=lambda v: v["ratio"]["median"])["name"] if peers else None


def verdicts(results: list[dict]) -> list[dict]:
    """For every target and every result it is about: what was reached, and the factor of it: met from 1 on."""
    found = []
    for limit in LIMITS:
        for result in results:
            if result["title"].startswith(limit.title) and result["direction"] == limit.direction:
                took, most = 1e6 * result["variants"][0]["seconds"], 1e6 * limit.seconds
                found.append(_verdict(result, "us a call, at most", most, took, most / took))
    for target in TARGETS:
        for result in results:
            title = result["title"]
            fits = title == target.title if target.title in EXACT else title.startswith(target.title)
            if not fits or result["direction"] != target.direction:
                continue
            name = best_peer(result) if target.against == BEST else target.against
            variant = next((v for v in result["variants"] if v["name"] == name), None)
            if variant is None or (target.memory and not variant["peak_bytes"]):
                continue
            reached, against = variant["ratio"]["median"], target.against
            if target.against == BEST:
                against = f"{BEST}: {name}"
            if target.memory:
                against = f"peak memory of {against}"
                reached = variant["peak_bytes"] / result["variants"][0]["peak_bytes"]
            found.append(_verdict(result, against, target.ratio, reached, reached / target.ratio))
    return found


def _verdict(result: dict, against: str, target: float, reached: float, factor: float) -> dict:
    same = {name: result[name] for name in ("title", "size", "default", "threads", "direction", "unstable")}
    return {**same, "against": against, "target": target, "ratio": reached, "factor": factor}
