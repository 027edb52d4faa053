"""Sparse routers: their common base class, Token Choice and Expert Choice."""

from __future__ import annotations

import math
from abc import abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.ops._checks import Check, larger, smaller, traced_size
from vmoe_routers.ops._dtypes import compute_dtype, fill_masked, without_autocast
from vmoe_routers.routers import losses
from vmoe_routers.routers.affinity import Affinity, Softmax
from vmoe_routers.routers.choice import expert_choice_unchecked, slots_per_expert, token_choice_unchecked
from vmoe_routers.routers.gates import Gates, as_gates
from vmoe_routers.routers.routing import Losses, SparseRouting

CAPACITY_ROUNDINGS = ("ceil", "round")


def check_tokens(check: Check, x: Tensor, mask: Tensor | None, dim: int, name: str, parameter: Tensor) -> Tensor:
    """Checks x [G, T, D] and fills the rows of masked tokens with zeros: a gradient of 0 times NaN would be NaN."""
    x = check.floating("x", x, "G T D")
    if x.shape[2] != dim:
        raise ValueError(f"{check.where}: x must have width {dim}, got shape {list(x.shape)}")
    check.device("x", x, name, parameter)
    if mask is not None:
        check.mask(mask, "x", x)
    return fill_masked(x, mask, 0.0)


class RouterLogits(nn.Module):
    """Logits of the sparse routers, x W^T in float32 (float64 for float64 tokens), also under autocast.

    This is a separate module with tensors as input and output, because wrappers that shard parameters (FSDP, ZeRO)
    gather them when the module is called.

    Args:
        dim: D, width of a token.
        num_experts: E.

    Attributes:
        weight: [E, D], drawn from a truncated normal of standard deviation sqrt(1 / D). There is no bias.
    """

    def __init__(self, dim: int, num_experts: int, device: Any = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight again."""
        # Truncating a normal distribution at two standard deviations multiplies its standard deviation by 0.8796.
        std = math.sqrt(1 / self.weight.shape[1]) / 0.87962566
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens x [G, T, D] to logits [G, T, E]."""
        with without_autocast(x):
            dtype = compute_dtype(x.dtype)
            return nn.functional.linear(x.to(dtype), self.weight.to(dtype))


class SparseRouter(nn.Module):
    """Base class of the five sparse routers: logits, noise, affinity and losses.

    Routing runs in float32 (float64 for float64 tokens), also for 16-bit tokens and under autocast.

    Args:
        dim: D, width of a token.
        num_experts: E.
        affinity: Makes the gates that select and the gates that weigh (`vmoe_routers.affinity`), by default `Softmax`.
        capacity_factor: Slots of all experts per token, > 0. `TokenChoiceRouter` multiplies this number by `top_k`.
        eval_capacity_factor: Capacity factor in eval, by default as in training.
        capacity_rounding, capacity_multiple_of: Arguments `rounding` and `multiple_of` of `vmoe_routers.capacity`.
        noise_std: In training, noise of this standard deviation divided by E is added to the logits.
        importance_loss_weight, load_loss_weight, balance_loss_weight, z_loss_weight: Weights of the auxiliary losses
            in `Routing.aux_loss`.

    Attributes:
        weight: [E, D], the parameter of `logits`.
        logits: The `RouterLogits`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        affinity: Affinity | None = None,
        *,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float | None = None,
        capacity_rounding: str = "ceil",
        capacity_multiple_of: int = 4,
        noise_std: float = 1.0,
        importance_loss_weight: float = 0.0,
        load_loss_weight: float = 0.0,
        balance_loss_weight: float = 0.0,
        z_loss_weight: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.check: Check = Check(type(self).__name__)
        check = self.check
        self.dim: int = check.integer("dim", dim, 1)
        self.num_experts: int = check.integer("num_experts", num_experts, 1)
        if affinity is not None and (isinstance(affinity, type) or not callable(affinity)):
            raise TypeError(f"{check.where}: affinity must be an Affinity such as Sinkhorn(), got {affinity!r}")
        self.affinity: Affinity = Softmax() if affinity is None else affinity
        self.capacity_factor: float = check.number("capacity_factor", capacity_factor)
        if eval_capacity_factor is None:
            eval_capacity_factor = self.capacity_factor
        self.eval_capacity_factor: float = check.number("eval_capacity_factor", eval_capacity_factor)
        check.choice("capacity_rounding", capacity_rounding, CAPACITY_ROUNDINGS)
        self.capacity_rounding = capacity_rounding
        self.capacity_multiple_of: int = check.integer("capacity_multiple_of", capacity_multiple_of, 0)
        self.noise_std: float = check.number("noise_std", noise_std, zero=True)
        self.loss_weights: dict[str, float] = {
            name: check.number(f"{name}_loss_weight", weight, zero=True)
            for name, weight in (
                ("importance", importance_loss_weight),
                ("load", load_loss_weight),
                ("balance", balance_loss_weight),
                ("z", z_loss_weight),
            )
        }
        self.logits: RouterLogits = RouterLogits(self.dim, self.num_experts, device=device, dtype=dtype)

    @property
    def weight(self) -> nn.Parameter:
        """[E, D], the parameter of `logits`."""
        return self.logits.weight

    def reset_parameters(self) -> None:
        """Draws the weight again."""
        self.logits.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Early state dicts of version 0.1.0 have the weight on the router.
        if prefix + "weight" in state_dict:
            state_dict[f"{prefix}logits.weight"] = state_dict.pop(prefix + "weight")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def draw_noise(self, logits: Tensor) -> Tensor:
        """Draws standard normal noise in the shape of the logits."""
        return torch.randn_like(logits)

    def slots(self, tokens: int) -> int:
        """Computes C, the slots per expert, for groups of `tokens` tokens."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        return slots_per_expert(tokens, self.num_experts, factor, self.capacity_rounding, self.capacity_multiple_of)

    def flops(self, tokens: int) -> float:
        """Counts the operations of the logits for a group of `tokens` tokens. A multiply-add is two operations."""
        return 2.0 * tokens * self.num_experts * self.dim

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SparseRouting:
        """Routes tokens x [G, T, D]. The mask is [G, T] bool, True = real token."""
        x = check_tokens(self.check, x, mask, self.dim, "weight", self.weight)
        logits = self.logits(x)
        with without_autocast(x):
            noise_std = self.noise_std / self.num_experts if self.training else 0.0
            noisy = logits + noise_std * self.draw_noise(logits) if noise_std > 0 else logits
            return self._route(logits, noisy, noise_std, mask)

    @abstractmethod
    def _route(self, logits: Tensor, noisy: Tensor, noise_std: float, mask: Tensor | None) -> SparseRouting: ...

    def _gates(self, logits: Tensor, noisy: Tensor, slots: int, mask: Tensor | None) -> tuple[Gates, Gates]:
        """Calls the affinity and checks the gates that select and the gates that weigh."""
        check, pair = self.check, self.affinity(logits, noisy, slots, mask)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            got = f"{len(pair)} values" if isinstance(pair, (tuple, list)) else type(pair).__name__
            raise TypeError(f"{check.where}: affinity must return the gates that select and that weigh, got {got}")
        gates, weights = pair
        selecting = as_gates(gates)
        weighing = selecting if weights is gates else as_gates(weights)
        for name, values in (("selecting", selecting), ("weighing", weighing)):
            source = values.source
            check.floating(f"the affinity's {name} gates", source)
            check.shape(f"the affinity's {name} gates", source, logits.shape, "G, T, E")
            check.device(f"the affinity's {name} gates", source, "the logits", logits)
        return selecting, weighing

    def _losses(self, logits: Tensor, noisy: Tensor, noise_std: float, top_k: int, mask: Tensor | None) -> Losses:
        return {
            "importance": partial(losses.importance_loss, logits, mask),
            "load": partial(losses.load_loss, logits, noisy, noise_std, top_k, mask),
            "balance": partial(losses.balance_loss, noisy, mask),
            "z": partial(losses.z_loss, logits, mask),
        }

    def extra_repr(self) -> str:
        """Lists the arguments that print(router) shows."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, affinity={self.affinity}, "
            f"capacity_factor={self.capacity_factor}, noise_std={self.noise_std}"
        )


class TokenChoiceRouter(SparseRouter):
    """Router in which every token chooses `top_k` experts (V-MoE, arXiv 2106.05974).

    First choices of all tokens are served before second choices. A request for a full buffer is dropped.

    Args:
        dim, num_experts, affinity: Arguments of `SparseRouter`.
        top_k: K, experts per token.
        batch_priority: Fills the buffers in descending order of the tokens' largest selecting gate.
        renormalize: Divides a token's weights by their sum over its `top_k` experts. With `top_k` 1 every weight is 1,
            so the router gets no gradient from the output.
        options: Further arguments of `SparseRouter`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        affinity: Affinity | None = None,
        *,
        top_k: int = 1,
        batch_priority: bool = False,
        renormalize: bool = False,
        **options: Any,
    ):
        super().__init__(dim, num_experts, affinity, **options)
        self.top_k: int = self.check.integer("top_k", top_k, 1, num_experts)
        self.batch_priority: bool = self.check.flag("batch_priority", batch_priority)
        self.renormalize: bool = self.check.flag("renormalize", renormalize)

    def slots(self, tokens: int) -> int:
        """Computes C, the slots per expert, for groups of `tokens` tokens with K requests each."""
        return super().slots(tokens * self.top_k)

    def _route(self, logits, noisy, noise_std, mask):
        slots = self.slots(traced_size(logits.shape[1]))
        selecting, weighing = self._gates(logits, noisy, slots, mask)
        terms = self._losses(logits, noisy, noise_std, self.top_k, mask)
        return token_choice_unchecked(
            selecting,
            weighing,
            self.top_k,
            slots,
            self.batch_priority,
            self.renormalize,
            mask,
            terms,
            self.loss_weights,
        )

    def extra_repr(self) -> str:
        """Lists the arguments that print(router) shows."""
        return f"{super().extra_repr()}, top_k={self.top_k}, batch_priority={self.batch_priority}"


class ExpertChoiceRouter(SparseRouter):
    """Router in which every expert chooses its C best tokens of the group (Expert Choice, arXiv 2202.09368).

    By default the capacity is rounded to the nearest integer (half to even), and not to a multiple of a number. So the
    experts compute as many slots as in Soft MoE with the same capacity factor.

    Args:
        dim, num_experts, affinity: Arguments of `SparseRouter`.
        renormalize: Divides a token's weights by their sum over the experts that took the token.
        capacity_rounding, capacity_multiple_of, options: Further arguments of `SparseRouter`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        affinity: Affinity | None = None,
        *,
        capacity_rounding: str = "round",
        capacity_multiple_of: int = 1,
        renormalize: bool = False,
        **options: Any,
    ):
        super().__init__(
            dim,
            num_experts,
            affinity,
            capacity_rounding=capacity_rounding,
            capacity_multiple_of=capacity_multiple_of,
            **options,
        )
        self.renormalize: bool = self.check.flag("renormalize", renormalize)

    def slots(self, tokens: int) -> int:
        """Computes C, the slots per expert, for groups of `tokens` tokens, clamped to [1, tokens]."""
        # The capacity of an empty group is clamped to 0 in forward.
        return larger(1, smaller(super().slots(tokens), tokens))

    def _route(self, logits, noisy, noise_std, mask):
        tokens = traced_size(logits.shape[1])
        slots = smaller(self.slots(tokens), tokens)
        selecting, weighing = self._gates(logits, noisy, slots, mask)
        terms = self._losses(logits, noisy, noise_std, 1, mask)
        return expert_choice_unchecked(selecting, weighing, slots, self.renormalize, mask, terms, self.loss_weights)
