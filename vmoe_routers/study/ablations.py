"""Ablations of a study: one setting of a few routers takes several values, everything else stays the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vmoe_routers.routers import ROUTERS


@dataclass(frozen=True)
class Arm:
    """Value of an ablation.

    Attributes:
        label: The value in figures and file names.
        settings: Changed fields of `Settings`.
        options: Changed options of the router.
        factor: Factor on the peak learning rate.
    """

    label: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0


@dataclass(frozen=True)
class Ablation:
    """Ablation of some routers at capacity factor 1, and K = 1 for Token Choice.

    The runs of the comparison are the runs of the study that belong to no ablation. If an arm changes nothing, the
    study does not train its models again: the runs of the comparison are the runs of the arm.

    Attributes:
        title: The title of its panel.
        routers: The routers that run; "dense" is the dense ViT.
        arms: The values, in ascending order.
        is_of_routers: Whether the changed settings affect `routers` alone. If so, the runs of the comparison represent
            all other routers.
        reference: Label of the arm with which the arms are compared; None: the runs of the comparison.
    """

    title: str
    routers: tuple[str, ...]
    arms: tuple[Arm, ...]
    is_of_routers: bool = False
    reference: str | None = None


_TOKEN, _EXPERT, _SOFT = "softmax_token_choice", "softmax_expert_choice", "soft"
_SINKHORN_TOKEN, _SINKHORN_EXPERT = "sinkhorn_token_choice", "sinkhorn_expert_choice"
_CONSTRAINED = "sparsity_constrained_expert_choice"
_SINKHORN = (_SINKHORN_TOKEN, _SINKHORN_EXPERT)


def _by_setting(name: str, *values: Any) -> tuple[Arm, ...]:
    return tuple(Arm(f"{value:g}", {name: value}) for value in values)


def _by_option(names: Sequence[str], default: float, *values: float) -> tuple[Arm, ...]:
    """Makes an arm for each value, in ascending order. An arm sets all options of `names` to its value.

    The arm of the default changes nothing.
    """
    arms = {value: Arm(f"{value:g}", options=dict.fromkeys(names, value)) for value in values}
    arms[default] = Arm(f"{default:g}")
    return tuple(arms[value] for value in sorted(arms))


_AUX_LOSS = ("importance_loss_weight", "load_loss_weight")

ABLATIONS: dict[str, Ablation] = {
    "learning_rate": Ablation(
        "learning rate over the chosen one",
        ("dense", *ROUTERS),
        (Arm("0.33", factor=1 / 3), Arm("1"), Arm("3", factor=3.0)),
    ),
    "aux_loss": Ablation("auxiliary loss of Expert Choice", (_EXPERT,), _by_option(_AUX_LOSS, 0.0, 0.005, 0.05)),
    "aux_loss_token_choice": Ablation(
        "auxiliary loss of Token Choice", (_TOKEN,), _by_option(_AUX_LOSS, 0.005, 0.0, 0.05)
    ),
    # The capacity is rounded, so the slots per image depend on the size of a group. With these capacity factors and 32
    # experts, an image of 49 tokens has 64 slots at every size. The runs of the comparison have 48.
    "group_size": Ablation(
        "images per group",
        (_TOKEN, _EXPERT),
        (
            Arm("1", {"group_size": 1}),
            Arm("8", {"group_size": 8}, {"capacity_factor": 1.31}),
            Arm("32", {"group_size": 32}, {"capacity_factor": 1.31}),
        ),
        reference="8",
    ),
    "experts": Ablation("experts", (_TOKEN, _EXPERT), _by_setting("num_experts", 8, 32, 128)),
    "experts_soft": Ablation(
        "experts of Soft MoE",
        (_SOFT,),
        (Arm("8", {"num_experts": 8}, {"capacity_factor": 1.31}), Arm("32", {"num_experts": 32})),
    ),
    "epochs": Ablation("epochs", ("dense", _TOKEN, _EXPERT, _SOFT), _by_setting("epochs", 1, 2, 8)),
    "sinkhorn_iterations": Ablation("Sinkhorn iterations", _SINKHORN, _by_option(["iterations"], 20, 5, 50)),
    "sinkhorn_epsilon": Ablation("Sinkhorn epsilon", _SINKHORN, _by_option(["epsilon"], 1.0, 0.1)),
    "transport_iterations": Ablation("transport iterations", (_CONSTRAINED,), _by_option(["iterations"], 20, 5, 50)),
    "noise": Ablation("noise on the logits", (_TOKEN, _EXPERT), _by_option(["noise_std"], 1.0, 0.0)),
    "identical_experts": Ablation(
        "identical experts at the start",
        (_TOKEN, _EXPERT, _SOFT),
        (Arm("no", {"identical_experts": False}), Arm("yes", {"identical_experts": True})),
    ),
    "soft_scale": Ablation(
        "initial scale of Soft MoE", (_SOFT,), _by_setting("scale_init", 1.0, 4.0, 16.0), is_of_routers=True
    ),
    "placement": Ablation(
        "blocks with a MoE layer",
        (_TOKEN, _EXPERT, _SOFT),
        (Arm("last half", {"moe_blocks": "last_half"}), Arm("every 2nd", {"moe_blocks": "every_2"})),
    ),
}
"""Ablations by name."""

TOGETHER: dict[str, tuple[str, ...]] = {
    "auxiliary loss of both routers": ("aux_loss", "aux_loss_token_choice"),
}
"""Ablations of the same options of different routers, by the title of the condition in which the routers have equal
values."""
