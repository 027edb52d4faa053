"""Targets, and the verdicts of a run on them.

CPU targets are for one thread, float32 and the default sizes. GPU targets name their sizes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

from benchmarks.case import BACKWARD, FORWARD, RECORDED, VIT_B, VIT_B_BFLOAT16, Size
from benchmarks.cases.grouped_mlp import NARROW_BFLOAT16
from benchmarks.cases.soft_mix import SQUARE_BFLOAT16
from benchmarks.cases.topk import MILLION

BEST = "best peer"  # the fastest variant that computes the same function, other than ours


@dataclass(frozen=True)
class Aim(ABC):
    """Results to which a target applies.

    Attributes:
        title: Beginning of the title of the case.
        direction: Direction of the result.
        device: "cpu" or "cuda".
        size: Size of the case; None for any size.
        cards: Names of the GPUs; empty for any GPU.
    """

    title: str
    direction: str
    device: str = field(default="cpu", kw_only=True)
    size: Size | None = field(default=None, kw_only=True)
    cards: tuple[str, ...] = field(default=(), kw_only=True)

    def is_about(self, result: dict, machine: dict) -> bool:
        title = result["title"]
        return (
            machine["device"] == self.device
            and (title == self.title if self.title in EXACT else title.startswith(self.title))
            and result["direction"] == self.direction
            and (self.size is None or str(self.size) == result["size"])
            and (not self.cards or any(card in machine["name"] for card in self.cards))
        )

    @property
    @abstractmethod
    def against(self) -> str:
        """Name of the variant or quantity to compare with."""

    @abstractmethod
    def reached(self, result: dict, report: dict) -> tuple[str, float, float, float] | None:
        """Compares a result with the target.

        Returns:
            The name of the variant or quantity, the wanted value, the reached value, and a factor that is at least 1 if
            the target is met. None if the report lacks the numbers.
        """


@dataclass(frozen=True)
class Target(Aim):
    """Wanted speedup.

    Attributes:
        versus: Name of a variant, or `BEST`.
        ratio: The least ratio of the variant's time to our time.
        memory: Compares peak memory instead of time.
    """

    versus: str
    ratio: float
    memory: bool = False

    @property
    def against(self) -> str:
        return f"peak memory of {self.versus}" if self.memory else self.versus

    def reached(self, result, report):
        name = best_peer(result) if self.versus == BEST else self.versus
        variant = next((v for v in result["variants"] if v["name"] == name), None)
        if variant is None or (self.memory and not variant["peak_bytes"]):
            return None
        came = variant["ratio"]["median"]
        if self.memory:
            came = variant["peak_bytes"] / result["variants"][0]["peak_bytes"]
        against = f"{BEST}: {name}" if self.versus == BEST else self.against
        return against, self.ratio, came, came / self.ratio


@dataclass(frozen=True)
class Limit(Aim):
    """Longest time.

    Attributes:
        seconds: The most seconds that our variant may take.
        beyond: Direction whose time is subtracted first; empty: nothing is subtracted.
    """

    seconds: float
    beyond: str = ""

    @property
    def against(self) -> str:
        words = "us a call" if self.device == "cpu" else "us"
        if self.beyond:
            words += f" more than {self.beyond}"
        return f"{words}, at most" + (f" ({', '.join(self.cards)})" if self.cards else "")

    def reached(self, result, report):
        took = result["variants"][0]["seconds"]
        if self.beyond:
            same = {name: result[name] for name in ("title", "size", "threads")} | {"direction": self.beyond}
            other = next((r for r in report["results"] if same.items() <= r.items()), None)
            if other is None:
                return None
            took -= other["variants"][0]["seconds"]
        # The difference of two small times may be 0 or negative.
        took, most = max(1e6 * took, 1e-3), 1e6 * self.seconds
        return self.against, most, took, most / took


@dataclass(frozen=True)
class Share(Aim):
    """Wanted bandwidth.

    Attributes:
        share: The least bandwidth with which the bytes of the floor are moved, as a share of the copy bandwidth of
            memory.
    """

    share: float
    against = "of copy bandwidth"

    def reached(self, result, report):
        rates = next(c["ceilings"] for c in report["ceilings"] if c["threads"] == result["threads"])
        came = result["floor"]["bytes"] / result["variants"][0]["seconds"] / rates["copy"]["DRAM"]
        return self.against, self.share, came, came / self.share


CPU = (
    Limit("call of ", FORWARD, 10e-6),
    Limit("call of ", RECORDED, 30e-6),
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
    # Our layer takes at most 0.95 times as long as the dense MLP, with gradients 1.1 times.
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

hopper = {"device": "cuda", "size": VIT_B, "cards": ("H100", "H200")}
CUDA = (
    Limit("softmax + top-k", FORWARD, 5e-6, **hopper),
    Share("softmax + top-k", FORWARD, 0.7, device="cuda", size=MILLION),
    Share("softmax + top-k", FORWARD, 0.7, device="cuda", size=replace(MILLION, experts=64)),
    Limit("softmax + top-k", BACKWARD, 6e-6, FORWARD, **hopper),
    Limit("slots in the tokens' order, one group", FORWARD, 10e-6, **hopper),
    Limit("slots with batch priority", FORWARD, 10e-6, **hopper),
    Limit("expert choice, one group", FORWARD, 15e-6, **hopper),
    Limit("expert choice, per image", FORWARD, 8e-6, **hopper),
    Limit("Sinkhorn, one group", FORWARD, 60e-6, **hopper),
    Limit("Sinkhorn, per image", FORWARD, 25e-6, **hopper),
    # 20 iterations of 3 us each. All 256 images run at once, several per multiprocessor.
    Limit("k-sparse transport, Adam, per image", FORWARD, 60e-6, **hopper),
    Share("dispatch, one group", FORWARD, 0.8, device="cuda", size=VIT_B_BFLOAT16),
    Share("combine, one group", FORWARD, 0.8, device="cuda", size=VIT_B_BFLOAT16),
    Target("expert MLPs, one group", FORWARD, "dense MLP, same FLOPs", 0.7, device="cuda", size=VIT_B_BFLOAT16),
    Target("expert MLPs, one group", FORWARD, "dense MLP, same FLOPs", 0.55, device="cuda", size=NARROW_BFLOAT16),
    # Twice the lower bound by the memory bandwidth of an H200. An H100 is slower.
    Limit("Soft MoE mixing", FORWARD, 150e-6, device="cuda", size=SQUARE_BFLOAT16, cards=("H200",)),
    Target("Soft MoE mixing", FORWARD, "torch softmax + bmm", 1.5, device="cuda", size=SQUARE_BFLOAT16),
)
AIMS = (*CPU, *CUDA)
EXACT = {"layer, soft"}  # titles that are also beginnings of other titles

RANDOM_ROWS = (
    "rows of 1.5 KiB in random order are read at half the rate of a copy, although every row is prefetched two slots "
    "ahead"
)
THREE_TENSORS = (
    "slots, expert outputs and the result take 13.8 MiB in every variant, more than a third of the other variant's peak"
)
WEIGHT_GRADIENTS = (
    "the gradients of the expert weights take 144 MiB in every variant, more than a third of the other variant's peak"
)
NOT_CONVERGED = "the plan does not converge within 20 iterations, so all 20 iterations run"

# Reason why a target is missed, by the beginning of the title (the longest match counts), the direction, and `against`
# (`BEST` for any best peer).
WHY: dict[tuple[str, str, str], str] = {
    ("dispatch + combine", FORWARD, "torch gather, both ways"): RANDOM_ROWS,
    ("dispatch + combine", BACKWARD, "torch gather, both ways"): RANDOM_ROWS,
    ("slots with batch priority, one group", FORWARD, "one-hot cumsum"): (
        "slots are assigned by priority, and sorting 12,544 tokens by priority takes two thirds of the time"
    ),
    ("Sinkhorn, one group, 4 sigma", FORWARD, "Megatron-LM's loop"): NOT_CONVERGED,
    ("Sinkhorn, one group, 4 sigma", BACKWARD, "scaling loop"): (
        f"{NOT_CONVERGED}, and each iteration passes over the matrix once in the forward and once in the backward"
    ),
    ("k-sparse transport, L-BFGS", FORWARD, "POT smooth_ot_semi_dual"): (
        "the projection of 32 columns takes 5 of the 6 us of an iteration: each projection bisects for its k-th "
        "largest entry"
    ),
    ("layer, softmax_token_choice", FORWARD, BEST): (
        "our kernel packs the weights in every call, because the weights change in training; the weights for oneDNN "
        "were packed ahead of time, which helps in inference only"
    ),
    ("layer, soft", FORWARD, "soft-moe-pytorch"): (
        "both variants spend most of the time in matrix products, so only faster products would help"
    ),
    ("layer, soft", FORWARD, "peak memory of bwconrad's form"): THREE_TENSORS,
    ("layer, soft", FORWARD, "peak memory of soft-moe-pytorch"): THREE_TENSORS,
    ("layer, soft", BACKWARD, "peak memory of bwconrad's form"): WEIGHT_GRADIENTS,
    ("layer, soft", BACKWARD, "peak memory of soft-moe-pytorch"): WEIGHT_GRADIENTS,
}


def best_peer(result: dict) -> str | None:
    """Returns the name of the fastest variant that computes the same function, other than ours."""
    peers = [v for v in result["variants"] if v["role"] not in ("ours", "dense", "yardstick") and not v["different"]]
    return min(peers, key=lambda v: v["ratio"]["median"])["name"] if peers else None


def verdicts(report: dict) -> list[dict]:
    """Compares every result of a run with every target that applies to it."""
    found = []
    for aim in AIMS:
        for result in report["results"]:
            reached = aim.reached(result, report) if aim.is_about(result, report["machine"]) else None
            if reached is None:
                continue
            same = {name: result[name] for name in ("title", "size", "default", "threads", "direction", "unstable")}
            against, target, ratio, factor = reached
            numbers = {"against": against, "target": target, "ratio": ratio, "factor": factor}
            found.append({**same, **numbers})
    return found


def reason(verdict: dict) -> str:
    """Returns the reason why a target is missed; empty if it is met or the reason is unknown."""
    held = verdict["direction"], BEST if verdict["against"].startswith(BEST) else verdict["against"]
    keys = [key for key in WHY if verdict["title"].startswith(key[0]) and key[1:] == held]
    return WHY[max(keys, key=lambda key: len(key[0]))] if keys and verdict["factor"] < 1 else ""
