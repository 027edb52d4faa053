"""Forward-mode AD: every op without a rule raises an error, and none returns a silent tangent of 0."""

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers import ops

LOGITS = torch.randn(2, 6, 4)
TOKENS = torch.randn(2, 6, 5)
TOKEN = torch.tensor([[[0, 1], [2, 3]], [[1, 4], [5, -1]]], dtype=torch.int32)  # [G, E, C]
GATE = torch.rand(2, 2, 2)

OPS = {
    "topk": (lambda x: ops.topk(x, 2)[0], LOGITS),
    "softmax_topk": (lambda x: ops.softmax_topk(x, 2)[0], LOGITS),
    "softmax_gather": (lambda x: ops.softmax_gather(x, torch.zeros(2, 6, 1, dtype=torch.int32)), LOGITS),
    "sinkhorn": (vr.sinkhorn, LOGITS),
    "ksparse_projection": (lambda x: vr.ksparse_projection(x, 2), LOGITS),
    "ksparse_transport": (lambda x: vr.ksparse_transport(x.softmax(-1), 2), LOGITS),
    "soft_logits": (lambda x: ops.soft_logits(x, torch.randn(5, 3)), TOKENS),
    "soft_mix of logits": (lambda x: ops.soft_mix(x, TOKENS, 1), LOGITS),
    "soft_mix of values": (lambda x: ops.soft_mix(LOGITS, x, 1), TOKENS),
    "grouped_mlp": (lambda x: ops.grouped_mlp(x, torch.ones(2, 5, 3), None, torch.ones(2, 3, 4), None), TOKENS),
    "dispatch": (lambda x: ops.dispatch(x, TOKEN, *ops.invert_slots(TOKEN, 6)[:2]), TOKENS),
    "combine": (lambda y: ops.combine(y, GATE, TOKEN, *ops.invert_slots(TOKEN, 6)[:2]), torch.randn(2, 2, 2, 5)),
} | {name: (vr.create_router(name, 5, 4), TOKENS) for name in vr.ROUTERS}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", OPS)
def test_refused(name):
    function, x = OPS[name]
    with pytest.raises(NotImplementedError, match="has a tangent of forward-mode AD"):
        torch.func.jvp(function, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        function(x)  # without a tangent
        with pytest.raises(NotImplementedError, match="has a tangent of forward-mode AD"):
            function(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
