"""The linear probe: the minimum of its loss, and its accuracy where the answer is known."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from vmoe_routers.training import linear_probe as module
from vmoe_routers.training.fewshot import Examples
from vmoe_routers.training.linear_probe import fit_logistic, linear_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def blobs(count, noise=1.5, seed=0, classes=3, width=4):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(5)).double()
    labels = torch.arange(count) % classes
    return Examples(centres[labels] + noise * torch.randn(count, width, generator=generator), labels)


@pytest.mark.parametrize("l2", [10.0, 0.01])
def test_fit_is_the_minimum(l2):
    x, y = blobs(60)
    features, onehot = np.hstack([x.numpy(), np.ones((60, 1))]), np.eye(3)[y.numpy()]

    def loss(flat):
        weights = flat.reshape(5, 3)
        logits = features @ weights
        top = logits.max(1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(1, keepdims=True))
        decay = weights * np.array([[1.0]] * 4 + [[0.0]])
        gradient = features.T @ (np.exp(log_p) - onehot) / 60 + l2 * decay
        return -(log_p * onehot).sum() / 60 + l2 / 2 * (decay**2).sum(), gradient.ravel()

    wanted = minimize(loss, np.zeros(15), jac=True, method="BFGS", options={"gtol": 1e-9})
    found = fit_logistic(Examples(x, y), l2, torch.zeros(5, 3).double())
    assert loss(found.numpy().ravel())[0] == pytest.approx(wanted.fun, rel=1e-8)
    np.testing.assert_allclose(found[:-1], wanted.x.reshape(5, 3)[:-1], atol=1e-4)


def test_accuracy():
    separable, mixed = blobs(80, noise=0.01), blobs(200)
    assert linear_probe(separable, blobs(40, noise=0.01, seed=1))[0] == 1
    accuracy, l2 = linear_probe(mixed, blobs(200, seed=1))
    assert 0.5 < accuracy < 0.95 and l2 in module.L2_REGULARISERS
    shifted = Examples(mixed.features * 100 + 7, mixed.labels)  # standardisation removes factor and offset
    test = blobs(200, seed=1)
    assert linear_probe(shifted, Examples(test.features * 100 + 7, test.labels)) == pytest.approx((accuracy, l2))


def test_the_regulariser_is_chosen_on_held_out_training_examples(monkeypatch):
    fits, checked = [], []
    fit, score = module.fit_logistic, module._accuracy_and_loss
    monkeypatch.setattr(module, "fit_logistic", lambda e, l2, w: fits.append((len(e.labels), l2)) or fit(e, l2, w))
    monkeypatch.setattr(module, "_accuracy_and_loss", lambda e, w: checked.append(e.labels) or score(e, w))
    x, y = blobs(100)
    order = y.argsort()  # class by class, as in a folder of images
    _, best = linear_probe(Examples(x[order], y[order]), blobs(30, seed=1))
    assert fits == [*((90, l2) for l2 in module.L2_REGULARISERS), (100, best)]
    assert [len(labels) for labels in checked] == [10] * len(module.L2_REGULARISERS) + [30]
    assert checked[0].bincount().tolist() == pytest.approx([3.3] * 3, abs=1)


def test_refuses_too_few():
    with pytest.raises(ValueError, match="needs at least 10 training images, got 9"):
        linear_probe(blobs(9), blobs(30))
