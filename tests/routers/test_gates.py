"""Gates that are computed only at the chosen positions give the results of dense gates."""

import pytest
import torch

import vmoe_routers as vr
from vmoe_routers.routers.gates import PlainGates, SoftmaxGates

ROUTERS = [name for name in vr.ROUTERS if name != "soft"]


class Dense:
    """An affinity that a user could write: it returns the gates of another affinity as two plain tensors."""

    def __init__(self, affinity):
        self.affinity = affinity

    def __call__(self, logits, noisy_logits, capacity, mask):
        pair = self.affinity(logits, noisy_logits, capacity, mask)
        return tuple(x if isinstance(x, torch.Tensor) else x.dense() for x in pair)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_priority": True, "renormalize": True, "top_k": 2}])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_gives_the_results_of_dense_gates(name, options, masked):
    if options and not name.endswith("token_choice"):
        options = {"capacity_factor": 2.0}
    router = vr.create_router(name, 6, 5, noise_std=2.0, dtype=torch.float64, **options)
    noise = torch.randn(3, 17, 5).double()
    router.draw_noise = lambda logits: noise
    x = torch.randn(3, 17, 6).double()
    mask = torch.rand(3, 17) > 0.3 if masked else None
    seen = []
    for affinity in (router.affinity, Dense(router.affinity)):
        router.affinity = affinity
        routing = router(x, mask)
        combine = routing.combine_tensor()
        ((combine * torch.arange(5.0)[:, None]).sum() + 10 * sum(routing.losses.values())).backward()
        metrics = torch.cat([value.double().flatten() for value in routing.metrics.values()])
        seen.append((routing.dispatch_tensor(), combine, routing.weights, metrics, router.weight.grad))
        router.weight.grad = None
    assert torch.equal(seen[0][0], seen[1][0])
    for got, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_two_forms_agree(dim):
    logits = torch.randn(2, 9, 4).double()
    mask = torch.rand(2, 9) > 0.3
    softmax = SoftmaxGates(logits)
    plain = PlainGates(softmax.dense())
    (values, indices), (wanted, wanted_indices) = softmax.choose(3, dim, mask), plain.choose(3, dim, mask)
    assert torch.equal(indices, wanted_indices)
    torch.testing.assert_close(values, wanted)
    torch.testing.assert_close(softmax.at(indices, dim), plain.at(indices, dim))


def test_the_functions_take_softmax_gates():
    logits = torch.randn(2, 9, 4)
    gates = logits.softmax(-1)
    for got, wanted in (
        (vr.token_choice(SoftmaxGates(logits), 2, 4), vr.token_choice(gates, 2, 4)),
        (vr.expert_choice(SoftmaxGates(logits), 3), vr.expert_choice(gates, 3)),
        (vr.expert_choice(gates, 3, weights=SoftmaxGates(logits)), vr.expert_choice(gates, 3)),
    ):
        assert torch.equal(got.token, wanted.token)
        torch.testing.assert_close(got.combine_tensor(), wanted.combine_tensor())
        torch.testing.assert_close(got.weights, gates)
    with pytest.raises(ValueError, match=r"^token_choice: gates .*3 axes"):
        vr.token_choice(SoftmaxGates(logits[0]), 2, 4)
