"""Linear probe: logistic regression on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vmoe_routers.training.fewshot import Examples

L2_REGULARISERS = tuple(10.0**i for i in range(1, -8, -1))
_EVERY = 10  # one training example in ten is held out


def linear_probe(train: Examples, test: Examples) -> tuple[float, float]:
    """Fits logistic regression to the training examples, standardised by their mean and standard deviation.

    The weights minimise the mean cross-entropy plus ``l2 / 2 |W|^2``. The bias is not regularised. The training
    examples are sorted by class, and every tenth example is held out. The regulariser with the best accuracy on the
    held-out examples is chosen. Among regularisers with equal accuracy, the regulariser with the smallest loss is
    chosen. The final fit uses all training examples.

    Returns:
        The accuracy on the test examples in [0, 1], and the regulariser.

    Raises:
        ValueError: There are fewer than ten training examples.
    """
    if len(train.labels) < _EVERY:
        raise ValueError(f"the linear probe needs at least {_EVERY} training images, got {len(train.labels)}")
    num_classes = 1 + int(max(labels.max() for _, labels in (train, test)))
    mean, std = train.features.mean(0), train.features.std(0, correction=0) + 1e-5
    train, test = (Examples((features - mean) / std, labels) for features, labels in (train, test))
    held_out = torch.zeros_like(train.labels, dtype=torch.bool)
    held_out[train.labels.argsort(stable=True)[_EVERY // 2 :: _EVERY]] = True
    kept, checked = (Examples(train.features[part], train.labels[part]) for part in (~held_out, held_out))
    weights, scores = train.features.new_zeros(1 + train.features.shape[1], num_classes), []
    for l2 in L2_REGULARISERS:  # from strong to weak; every fit starts from the previous weights
        weights = fit_logistic(kept, l2, weights)
        scores.append((*_accuracy_and_loss(checked, weights), l2))
    *_, best = max(scores, key=lambda score: (score[0], -score[1]))
    weights = fit_logistic(train, best, torch.zeros_like(weights))
    return _accuracy_and_loss(test, weights)[0], best


@torch.enable_grad()
def fit_logistic(examples: Examples, l2: float, start: Tensor) -> Tensor:
    """Minimises the regularised loss by L-BFGS. Returns weights [D + 1, classes] with the bias in the last row."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(_logits(examples, weights), examples.labels) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def _logits(examples: Examples, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], examples.features, weights[:-1])


def _accuracy_and_loss(examples: Examples, weights: Tensor) -> tuple[float, float]:
    logits = _logits(examples, weights)
    right = (logits.argmax(1) == examples.labels).double().mean()
    return float(right), float(F.cross_entropy(logits, examples.labels))
