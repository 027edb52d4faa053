"""Affinities: from logits [G, T, E] to what selects and what weighs.

An affinity is called with the logits, the same with noise, the capacity C and a
mask; it returns two of gates [G, T, E]: the router takes its top-k of the first, and
the second gives the gates of the combine tensor. Either is a tensor or, where not all of it
need be written out, a `Gates`; any affinity goes with any router
(`TokenChoiceRouter(affinity=Sinkhorn())`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from vmoe_routers.gates import Gates, SoftmaxGates
from vmoe_routers.ops import ksparse_transport, sinkhorn
from vmoe_routers.ops._checks import check_choice, check_flag, check_int, check_positive
from vmoe_routers.ops.sinkhorn import GRADIENTS

Combine = Literal["softmax", "plan"]
COMBINES = ("softmax", "plan")


class Affinity(Protocol):
    """What a sparse router asks of an affinity."""

    def __call__(
        self, logits: Tensor, noisy_logits: Tensor, capacity: int, mask: Tensor | None
    ) -> tuple[Tensor | Gates, Tensor | Gates]:
        """What selects and what weighs, both [G, T, E]; may be the same object."""
        ...


@dataclass(frozen=True)
class Softmax:
    """Softmax over the experts; the noisy one both selects and weighs."""

    def __call__(self, logits, noisy_logits, capacity, mask):
        """See `Affinity`."""
        gates = SoftmaxGates(noisy_logits)
        return gates, gates


@dataclass(frozen=True)
class Sinkhorn:
    """The entropy-regularised transport plan selects; see `vmoe_routers.sinkhorn`.

    Attributes:
        combine: "softmax" weighs by the softmax of the logits, "plan" by the plan.
        noisy_softmax: whether that softmax is of the noisy logits.
        iterations, epsilon, tolerance, gradient: of `vmoe_routers.sinkhorn`.
    """

    combine: Combine = "softmax"
    iterations: int = 20
    epsilon: float = 1.0
    tolerance: float | None = None
    gradient: Literal["unrolled", "implicit"] = "unrolled"
    noisy_softmax: bool = True

    def __post_init__(self):
        check_choice("Sinkhorn", "combine", self.combine, COMBINES)
        check_int("Sinkhorn", "iterations", self.iterations, 1)
        check_positive("Sinkhorn", "epsilon", self.epsilon)
        if self.tolerance is not None:
            check_positive("Sinkhorn", "tolerance", self.tolerance)
        check_choice("Sinkhorn", "gradient", self.gradient, GRADIENTS)
        check_flag("Sinkhorn", "noisy_softmax", self.noisy_softmax)

    def __call__(self, logits, noisy_logits, capacity, mask):
        """See `Affinity`."""
        if self.combine == "plan":
            plan = self._plan(noisy_logits, mask)
            return plan, plan
        weighing = noisy_logits if self.noisy_softmax else logits
        return self._plan(noisy_logits.detach(), mask), SoftmaxGates(weighing)

    def _plan(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        return sinkhorn(
            logits,
            epsilon=self.epsilon,
            iterations=self.iterations,
            tolerance=self.tolerance,
            mask=mask,
            gradient=self.gradient,
        )


@dataclass(frozen=True)
class SparsityConstrained:
    """The k-sparse transport plan of S = softmax(logits), k = C, selects.

    Without noise. See `vmoe_routers.ksparse_transport`.

    Attributes:
        combine: "softmax" weighs by S, "plan" by the plan.
        iterations, learning_rate, tolerance: of the Adam that finds the potentials.
    """

    combine: Combine = "softmax"
    iterations: int = 20
    learning_rate: float = 0.01
    tolerance: float = 1e-3

    def __post_init__(self):
        check_choice("SparsityConstrained", "combine", self.combine, COMBINES)
        check_int("SparsityConstrained", "iterations", self.iterations, 0)
        check_positive("SparsityConstrained", "learning_rate", self.learning_rate)
        check_positive("SparsityConstrained", "tolerance", self.tolerance, zero=True)

    def __call__(self, logits, noisy_logits, capacity, mask):
        """See `Affinity`."""
        by_plan = self.combine == "plan"
        plan = ksparse_transport(
            (logits if by_plan else logits.detach()).softmax(-1),
            min(capacity, logits.shape[1]),
            iterations=self.iterations,
            learning_rate=self.learning_rate,
            tolerance=self.tolerance,
            mask=mask,
        )
        return plan, plan if by_plan else SoftmaxGates(logits)
