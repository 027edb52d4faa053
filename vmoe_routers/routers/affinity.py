"""Affinities: map logits [G, T, E] to the gates that select and the gates that weigh.

A sparse router calls its affinity with the logits, the noisy logits, the capacity C and the mask. The affinity returns
two gates [G, T, E], each a tensor or a `Gates`: the router selects by the top-k of the first, and the second gives the
weights of the combine tensor. Every affinity works with every sparse router:
``TokenChoiceRouter(192, 8, affinity=Sinkhorn())``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops.ksparse_transport import ksparse_transport_unchecked
from vmoe_routers.ops.sinkhorn import GRADIENTS, sinkhorn_unchecked
from vmoe_routers.routers.gates import Gates, SoftmaxGates

Combine = Literal["softmax", "plan"]
COMBINES = ("softmax", "plan")


class Affinity(Protocol):
    """Function, or callable object, from logits to gates."""

    def __call__(
        self, logits: Tensor, noisy_logits: Tensor, capacity: int, mask: Tensor | None
    ) -> tuple[Tensor | Gates, Tensor | Gates]:
        """Computes the gates that select and the gates that weigh, both [G, T, E]. May return one object twice."""
        ...


@dataclass(frozen=True)
class Softmax:
    """Selects and weighs by the softmax of the noisy logits over the experts."""

    def __call__(
        self, logits: Tensor, noisy_logits: Tensor, capacity: int, mask: Tensor | None
    ) -> tuple[SoftmaxGates, SoftmaxGates]:
        """Returns one `SoftmaxGates` twice."""
        gates = SoftmaxGates(noisy_logits)
        return gates, gates


@dataclass(frozen=True)
class Sinkhorn:
    """Selects by the entropy-regularised transport plan of the noisy logits (`vmoe_routers.sinkhorn`).

    Attributes:
        combine: "softmax" weighs by a softmax, "plan" by the plan.
        iterations, epsilon, tolerance, gradient: Arguments of `vmoe_routers.sinkhorn`.
        noisy_softmax: Whether the softmax that weighs is of the noisy logits, or of the logits without noise.
    """

    combine: Combine = "softmax"
    iterations: int = 20
    epsilon: float = 1.0
    tolerance: float | None = None
    gradient: Literal["unrolled", "implicit"] = "unrolled"
    noisy_softmax: bool = True

    def __post_init__(self) -> None:
        check = Check("Sinkhorn")
        check.choice("combine", self.combine, COMBINES)
        check.integer("iterations", self.iterations, 1)
        check.number("epsilon", self.epsilon)
        if self.tolerance is not None:
            check.number("tolerance", self.tolerance)
        check.choice("gradient", self.gradient, GRADIENTS)
        check.flag("noisy_softmax", self.noisy_softmax)

    def __call__(
        self, logits: Tensor, noisy_logits: Tensor, capacity: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | SoftmaxGates]:
        """Returns the plan of the noisy logits, and the softmax or the plan."""
        if self.combine == "plan":
            plan = self._plan(noisy_logits, mask)
            return plan, plan
        weighing = noisy_logits if self.noisy_softmax else logits
        return self._plan(noisy_logits.detach(), mask), SoftmaxGates(weighing)

    def _plan(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        return sinkhorn_unchecked(logits, self.epsilon, self.iterations, self.tolerance, mask, self.gradient)[0]


@dataclass(frozen=True)
class SparsityConstrained:
    """Selects by the k-sparse transport plan of S = softmax(logits), k = C (`vmoe_routers.ksparse_transport`).

    The noisy logits are not used.

    Attributes:
        combine: "softmax" weighs by S, "plan" by the plan.
        iterations, learning_rate, tolerance: Arguments of the Adam solver that finds the potentials.
    """

    combine: Combine = "softmax"
    iterations: int = 20
    learning_rate: float = 0.01
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        check = Check("SparsityConstrained")
        check.choice("combine", self.combine, COMBINES)
        check.integer("iterations", self.iterations, 0)
        check.number("learning_rate", self.learning_rate)
        check.number("tolerance", self.tolerance, zero=True)

    def __call__(
        self, logits: Tensor, noisy_logits: Tensor, capacity: int, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | SoftmaxGates]:
        """Returns the plan of the logits without noise, and S or the plan."""
        by_plan = self.combine == "plan"
        similarity = (logits if by_plan else logits.detach()).softmax(-1)
        plan = ksparse_transport_unchecked(
            similarity, capacity, self.iterations, "adam", self.learning_rate, self.tolerance, 1.0, mask
        )
        return plan, plan if by_plan else SoftmaxGates(logits)
