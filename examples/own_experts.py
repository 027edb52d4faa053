"""Experts of your own: any modules, one for each expert, or one module that computes all slots at once."""

import torch
from torch import Tensor, nn

import vmoe_routers as vr


class ScaledExperts(nn.Module):
    """One shared MLP, and a scale for each expert."""

    def __init__(self, num_experts: int, dim: int):
        super().__init__()
        self.num_experts = num_experts
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.scale = nn.Parameter(torch.ones(num_experts, 1, 1, dim))

    def forward(self, x: Tensor, filled: Tensor | None = None) -> Tensor:
        """Maps slots x [E, G, C, D] to slots of the same shape."""
        return self.scale * self.mlp(x)


if __name__ == "__main__":
    tokens = torch.randn(2, 49, 64)
    linear = [nn.Linear(64, 64) for _ in range(4)]
    print(vr.MoEMlp(64, num_experts=4, router="soft", experts=linear)(tokens).shape)
    print(vr.MoEMlp(64, num_experts=4, router="soft", experts=ScaledExperts(4, 64))(tokens).shape)
