"""Few-shot transfer: a linear probe on frozen features, in closed form.

The probe follows the authors' reference code: ten examples per class, whitened by their mean and standard deviation,
and ridge regression on targets of +-1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vmoe_routers.training.data import evenly

L2_REGULARISERS = tuple(2.0**i for i in range(-10, 20))
SHOTS = 10
BIAS = 100.0  # value of the constant feature, which is regularised like every other feature


def sample_shots(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Draws the indices of `shots` random examples of every class, sorted by class."""
    import numpy as np

    rng = np.random.default_rng(seed)
    chosen = []
    for label in range(int(labels.max()) + 1):
        (members,) = np.nonzero(labels.numpy() == label)
        chosen.append(torch.from_numpy(rng.permutation(members)[:shots]))
    return torch.cat(chosen)


def probe_seed(seed: int, sub_seed: int) -> int:
    """Computes the seed of the generator from the seed of a study and the number of a draw."""
    return hash((seed, sub_seed)) % 2**31


def whiten(features: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Standardises features [N, D] and appends the constant: float64 [N, D + 1]."""
    white = (features.double() - mean) / std
    return torch.cat([white, white.new_full((len(white), 1), BIAS)], dim=1)


def shot_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Computes mean and population standard deviation, plus 1e-5, of the shots. Both are [1, D] float64."""
    features = features.double()
    return features.mean(0, keepdim=True), features.std(0, keepdim=True, correction=0) + 1e-5


def fit_ridge(white: Tensor, labels: Tensor, num_classes: int, l2: tuple[float, ...]) -> Tensor:
    """Fits ridge regression for every regulariser.

    Returns:
        Weights W [len(l2), D + 1, classes] that minimise ``|white W - targets|^2 + l2 |W|^2``, with targets ``2 *
            onehot - 1``.
    """
    targets = 2 * torch.nn.functional.one_hot(labels, num_classes).double() - 1
    values, vectors = torch.linalg.eigh(white.T @ white)
    projected = vectors.T @ (white.T @ targets)
    # All regularisers share one eigendecomposition.
    return torch.stack([vectors @ (projected / (values.clamp(min=0) + penalty).unsqueeze(1)) for penalty in l2])


def draw_shots(labels: Tensor, shots: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws the shots, and at most 1,000 other examples to choose the regulariser. Returns their indices.

    Raises:
        ValueError: No example is left besides the shots.
    """
    chosen = sample_shots(labels, shots, seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    held_out = rest.nonzero().squeeze(1)
    if not len(held_out):
        raise ValueError(
            f"{shots} shots take all {len(labels)} training images, and none is left to choose the regulariser on"
        )
    return chosen, held_out[evenly(len(held_out), 1000)]


class Examples(NamedTuple):
    """Features [N, D] and labels [N]."""

    features: Tensor
    labels: Tensor


def ridge_probe(shots: Examples, held_out: Examples, test: Examples) -> tuple[float, float]:
    """Fits a probe to the shots, with the regulariser that is best on the held-out examples.

    Returns:
        The accuracy on the test examples in [0, 1], and the regulariser.
    """
    num_classes = 1 + int(max(labels.max() for _, labels in (shots, held_out, test)))
    mean, std = shot_statistics(shots.features)
    weights = fit_ridge(whiten(shots.features, mean, std), shots.labels, num_classes, L2_REGULARISERS)
    best = int(_accuracies(whiten(held_out.features, mean, std), held_out.labels, weights).argmax())
    accuracy = _accuracies(whiten(test.features, mean, std), test.labels, weights[best].unsqueeze(0))
    return float(accuracy), L2_REGULARISERS[best]


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
    """Computes the accuracy in [0, 1] of a probe fitted to `shots` examples per class, as the mean over draws.

    Args:
        train_features, train_labels: [N, D] and [N]. The shots are drawn from these examples. The regulariser is
            chosen on at most 1,000 of the examples that were not drawn.
        test_features, test_labels: [M, D] and [M], the examples on which the accuracy is measured.
        shots: examples per class. A class with fewer examples gives all of them.
        seed: the seed of the draws.
        draws: number of draws.

    Raises:
        ValueError: No example is left besides the shots.
    """
    test, accuracies = Examples(test_features, test_labels), []
    for draw in range(draws):
        parts = draw_shots(train_labels, shots, probe_seed(seed, draw))
        chosen, held_out = (Examples(train_features[part], train_labels[part]) for part in parts)
        accuracies.append(ridge_probe(chosen, held_out, test)[0])
    return sum(accuracies) / draws


def _accuracies(white: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Computes the accuracies [L] of weights [L, D + 1, classes]."""
    predicted = torch.einsum("nd,ldc->lnc", white, weights).argmax(-1)
    return (predicted == labels).double().mean(1)
