"""An affinity of your own: gates by sigmoid instead of softmax, for Token Choice and for Expert Choice."""

import torch

import vmoe_routers as vr


def sigmoid(logits, noisy_logits, capacity, mask):
    """Returns the sigmoid with noise, which selects, and the sigmoid without noise, which weighs, both [G, T, E]."""
    return noisy_logits.sigmoid(), logits.sigmoid()


if __name__ == "__main__":
    for kind in (vr.TokenChoiceRouter, vr.ExpertChoiceRouter):
        layer = vr.MoEMlp(64, num_experts=4, router=kind(64, 4, affinity=sigmoid))
        print(kind.__name__, layer(torch.randn(2, 49, 64)).shape)
