"""Soft MoE (arXiv 2308.00951): slots are weighted means of tokens, and tokens weighted means of slots."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vmoe_routers.ops._checks import Check
from vmoe_routers.ops._dtypes import compute_dtype, fill_masked, without_autocast
from vmoe_routers.ops.soft_logits import soft_logits_unchecked
from vmoe_routers.routers.choice import slots_per_expert as slots_for
from vmoe_routers.routers.routing import SoftRouting
from vmoe_routers.routers.sparse import check_tokens


class SoftLogits(nn.Module):
    """Logits of Soft MoE, ``<x / |x|, scale * Phi / |Phi|>``, Phi normalised over the width.

    This is a separate module with tensors as input and output, because wrappers that shard parameters (FSDP, ZeRO)
    gather them when the module is called.

    Args:
        dim: D, width of a token.
        num_experts: E.
        slots_per_expert: C.
        scale_init: Initial scale.

    Attributes:
        phi: [D, E, C], drawn from a normal of standard deviation sqrt(1 / D), truncated at two standard deviations.
        scale: [1].
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        slots_per_expert: int,
        scale_init: float,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.scale_init = scale_init
        self.phi: nn.Parameter = nn.Parameter(
            torch.empty(dim, num_experts, slots_per_expert, device=device, dtype=dtype)
        )
        # The scale has one axis: FSDP2 and ZeRO do not shard parameters without axes.
        self.scale: nn.Parameter = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws Phi again and resets the scale."""
        std = math.sqrt(1 / self.phi.shape[0])
        nn.init.trunc_normal_(self.phi, std=std, a=-2 * std, b=2 * std)
        nn.init.constant_(self.scale, self.scale_init)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens x [G, T, D] to logits [G, T, E * C], ordered by expert, in float32 (float64 for float64)."""
        with without_autocast(x):
            dtype = compute_dtype(x.dtype)
            phi = self.phi.to(dtype).flatten(1)
            # Divide a column whose largest entry is above 1 by this entry, because its squares may overflow. All
            # constants are numbers of float16, because other runtimes may compute an exported router in float16.
            largest = phi.detach().abs().amax(0, keepdim=True).clamp(min=1)
            phi = phi / largest
            unit = phi * (phi.square().sum(0, keepdim=True) + 1e-6 / largest / largest).rsqrt()
            return soft_logits_unchecked(x, self.scale.to(dtype) * unit)


class SoftRouter(nn.Module):
    """Router of Soft MoE (arXiv 2308.00951). Only the logits use normalised tokens. The mixing does not.

    Args:
        dim: D, width of a token.
        num_experts: E.
        slots_per_expert: C, 1 by default.
        capacity_factor: Alternative to `slots_per_expert`. Requires `num_tokens`, because C fixes the shape of Phi.
        num_tokens: Tokens of a group, only with `capacity_factor`.
        scale_init: Initial scale. With the scale 1 and a small width, all slots start close to the mean token and stay
            close to it in short trainings. A scale of about 2 sqrt(D) avoids this.
        noise_std: Standard deviation of the noise on the logits in training.

    Attributes:
        phi: [D, E, C], the parameter of `logits`.
        scale: [1], the parameter of `logits`.
        logits: The `SoftLogits`.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        slots_per_expert: int | None = None,
        capacity_factor: float | None = None,
        num_tokens: int | None = None,
        scale_init: float = 1.0,
        noise_std: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.check: Check = Check("SoftRouter")
        check = self.check
        self.dim: int = check.integer("dim", dim, 1)
        self.num_experts: int = check.integer("num_experts", num_experts, 1)
        if capacity_factor is None:
            if num_tokens is not None:
                raise ValueError("SoftRouter: num_tokens requires capacity_factor, which is not given")
            slots = 1 if slots_per_expert is None else slots_per_expert
            self.slots_per_expert: int = check.integer("slots_per_expert", slots, 1)
        elif slots_per_expert is not None:
            raise ValueError("SoftRouter: give slots_per_expert or capacity_factor, not both")
        elif num_tokens is None:
            raise ValueError(
                "SoftRouter: capacity_factor needs num_tokens, the tokens of a group, "
                "because Phi's shape depends on them"
            )
        else:
            num_tokens = check.integer("num_tokens", num_tokens, 1)
            capacity_factor = check.number("capacity_factor", capacity_factor)
            self.slots_per_expert = slots_for(num_tokens, self.num_experts, capacity_factor, "round", 1)
        self.noise_std: float = check.number("noise_std", noise_std, zero=True)
        scale_init = check.number("scale_init", scale_init)
        self.logits: SoftLogits = SoftLogits(
            self.dim, self.num_experts, self.slots_per_expert, scale_init, device, dtype
        )

    @property
    def phi(self) -> nn.Parameter:
        """[D, E, C], the parameter of `logits`."""
        return self.logits.phi

    @property
    def scale(self) -> nn.Parameter:
        """Scale [1], a parameter of `logits`."""
        return self.logits.scale

    def reset_parameters(self) -> None:
        """Draws Phi again and resets the scale."""
        self.logits.reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Early state dicts of version 0.1.0 have the parameters on the router, and the scale has no axis.
        for name in ("phi", "scale"):
            if prefix + name in state_dict:
                value = state_dict.pop(prefix + name)
                state_dict[f"{prefix}logits.{name}"] = value.reshape(1) if value.ndim == 0 else value
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def slots(self, tokens: int) -> int:
        """Gives C, the slots per expert, which the shape of Phi fixes for any number of tokens."""
        return self.slots_per_expert

    def flops(self, tokens: int) -> float:
        """Counts the operations of the logits and the two mixtures for a group of `tokens` tokens."""
        return 6.0 * tokens * self.num_experts * self.slots_per_expert * self.dim

    def draw_noise(self, logits: Tensor) -> Tensor:
        """Draws standard normal noise in the shape of the logits [G, T, E, C]."""
        return torch.randn_like(logits)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> SoftRouting:
        """Routes tokens x [G, T, D]. The mask is [G, T] bool, True = real token."""
        x = check_tokens(self.check, x, mask, self.dim, "phi", self.phi)
        logits = self.logits(x)
        with without_autocast(x):
            if self.training and self.noise_std > 0:
                by_slot = logits.unflatten(2, (self.num_experts, self.slots_per_expert))
                logits = logits + self.noise_std * self.draw_noise(by_slot).flatten(2)
            return SoftRouting(fill_masked(logits, mask), self.num_experts, mask)

    def extra_repr(self) -> str:
        """Lists the arguments that print(router) shows."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, "
            f"slots_per_expert={self.slots_per_expert}, noise_std={self.noise_std}"
        )
