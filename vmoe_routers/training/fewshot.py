"""Few-shot transfer: a linear probe on frozen features, in closed form.

The probe follows the authors' reference code: ten examples per class, whitened by their mean and standard deviation,
and ridge regression on targets of +-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe_routers.training.data import evenly

L2_REGULARISERS = tuple(2.0**i for i in range(-10, 20))
SHOTS = 10
BIAS = 100.0  # the value of the constant feature, which is regularised like every feature


def sample_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Indices of `shots` random examples of every class, sorted by class."""
    import numpy as np

    rng = np.random.default_rng(seed)
    chosen = []
    for label in range(int(labels.max()) + 1):
        (members,) = np.nonzero(labels.numpy() == label)
        chosen.append(torch.from_numpy(rng.permutation(members)[:shots]))
    return torch.cat(chosen)


def probe_seed(seed: int, sub_seed: int) -> int:
    """The generator's seed, from a study's seed and the number of a draw."""
    return hash((seed, sub_seed)) % 2**31


def whiten(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardises features [N, D] and appends the constant: float64 [N, D + 1]."""
    white = (features.double() - mean) / std
    return torch.cat([white, white.new_full((len(white), 1), BIAS)], dim=1)


def shot_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """The shots' mean, and their population standard deviation plus 1e-5, both [1, D] float64."""
    features = features.double()
    return features.mean(0, keepdim=True), features.std(0, keepdim=True, correction=0) + 1e-5


def fit_ridge(white: Tensor, labels: Tensor, num_classes: int, l2: tuple[float, ...]) -> Tensor:
    """Weights [len(l2), D + 1, classes] that minimise ``|white W - targets|^2 + l2 |W|^2``, targets 2 * onehot - 1."""
    targets = 2 * torch.nn.functional.one_hot(labels, num_classes).double() - 1
    values, vectors = torch.linalg.eigh(white.T @ white)
    projected = vectors.T @ (white.T @ targets)
    # All regularisers share one eigendecomposition.
    return torch.stack([vectors @ (projected / (values.clamp(min=0) + penalty).unsqueeze(1)) for penalty in l2])


def few_shot_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    shots: int = SHOTS,
    seed: int = 0,
    draws: int = 3,
) -> float:
    """The accuracy in [0, 1] of a probe fitted to `shots` examples per class, as the mean over `draws` draws.

    Args:
        train_features, train_labels: [N, D] and [N]. The shots are drawn from these examples. The regulariser is
            chosen on at most 1,000 of the examples that were not drawn.
        test_features, test_labels: [M, D] and [M], the examples on which the accuracy is measured.
        shots: examples per class. A class with fewer examples gives all of them.
        seed: the seed of the draws.
        draws: number of draws.
    """
    num_classes = int(max(train_labels.max(), test_labels.max())) + 1
    accuracies = []
    for draw in range(draws):
        chosen = sample_shots(train_labels, shots, probe_seed(seed, draw))
        rest = torch.ones(len(train_labels), dtype=torch.bool)
        rest[chosen] = False
        mean, std = shot_statistics(train_features[chosen])
        weights = fit_ridge(
            whiten(train_features[chosen], mean, std), train_labels[chosen], num_classes, L2_REGULARISERS
        )
        held_out = rest.nonzero().squeeze(1)
        held_out = held_out[evenly(len(held_out), 1000)]
        scores = _accuracies(whiten(train_features[held_out], mean, std), train_labels[held_out], weights)
        best = weights[int(scores.argmax())].unsqueeze(0)
        accuracies.append(float(_accuracies(whiten(test_features, mean, std), test_labels, best)))
    return sum(accuracies) / draws


def _accuracies(white: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The accuracies [L] of weights [L, D + 1, classes]."""
    predicted = torch.einsum("nd,ldc->lnc", white, weights).argmax(-1)
    return (predicted == labels).double().mean(1)
