"""A router of your own sends tokens to experts by position. The router works in a layer or a ViT, like the six routers.

python examples/own_router.py
vmoe-routers study --routers soft,examples.own_router:HashRouter
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vmoe_routers as vr


class HashRouter(nn.Module):
    """Token t goes to expert t mod E; nothing is learned."""

    def __init__(self, dim: int, num_experts: int):
        super().__init__()
        self.dim, self.num_experts = dim, num_experts

    def forward(self, x: Tensor, mask: Tensor | None = None) -> vr.Routing:
        """Routes tokens x [G, T, D]."""
        groups, tokens, _ = x.shape
        expert = torch.arange(tokens, device=x.device) % self.num_experts
        gates = F.one_hot(expert, self.num_experts).float().expand(groups, -1, -1)  # [G, T, E]
        return vr.token_choice(gates, top_k=1, capacity=self.slots(tokens), mask=mask)

    def slots(self, tokens: int) -> int:
        """Returns the slots per expert. `vmoe_routers.models.cost` calls this method."""
        return vr.capacity(tokens, self.num_experts, factor=1.0)


if __name__ == "__main__":
    layer = vr.MoEMlp(64, 128, num_experts=4, router=HashRouter)
    with vr.inspect.record(layer) as trace:
        layer(torch.randn(2, 49, 64)).sum().backward()
    print(trace.routings[""][0].metrics["load"])
