"""The few-shot probe: against the reference code's numbers, and against least squares by brute force."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vmoe_routers.training import few_shot_accuracy, fewshot
from vmoe_routers.training.fewshot import (
    BIAS,
    L2_REGULARISERS,
    fit_ridge,
    probe_seed,
    sample_shots,
    shot_statistics,
    whiten,
)

GOLDEN = Path(__file__).parents[1] / "golden"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "fewshot_N_lt_D.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file if name != "config"}


def test_sampling_is_the_references():
    with np.load(GOLDEN / "fewshot_sampling.npz") as file:
        labels, seed = torch.from_numpy(file["y"]), int(file["seed"])
        for shots in (1, 5):
            np.testing.assert_array_equal(sample_shots(labels, shots, seed).numpy(), file[f"idx_{shots}shot"])
        assert [probe_seed(0, draw) for draw in range(3)] == [int(file[f"tuple_hash_seed0_sub{i}"]) for i in range(3)]


def test_statistics_are_the_references(golden):
    mean, std = shot_statistics(golden["x_train"])
    torch.testing.assert_close(mean, golden["mean"].double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(std, golden["std"].double(), atol=1e-6, rtol=0)


def test_weights_are_the_references(golden):
    white = whiten(golden["x_train"], *shot_statistics(golden["x_train"]))
    assert white.shape == (15, 65) and (white[:, -1] == BIAS).all()
    weights = fit_ridge(white, golden["y_train"], 5, tuple(golden["l2_of_W"].tolist()))
    for ours, theirs in zip(weights, golden["W"].double()):
        # The reference solved this problem, which has eigenvalues from 1e-3 to 1e5, in float32.
        assert (ours - theirs).norm() < 2e-4 * theirs.norm()


def test_accuracies_are_the_references(golden):
    assert golden["l2_regs"].tolist() == list(L2_REGULARISERS)
    mean, std = shot_statistics(golden["x_train"])
    weights = fit_ridge(whiten(golden["x_train"], mean, std), golden["y_train"], 5, L2_REGULARISERS)
    predicted = (whiten(golden["x_test"], mean, std) @ weights).argmax(-1)
    accuracy = (predicted == golden["y_test"]).double().mean(1)
    torch.testing.assert_close(accuracy, golden["accuracy"].double(), atol=1e-6, rtol=0)


def blobs(examples, classes=4, width=6, noise=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(5))
    labels = torch.arange(examples) % classes
    return centres[labels] + noise * torch.randn(examples, width, generator=generator), labels


def ridge(features, labels, classes, l2):
    """Solves ridge regression as an augmented least-squares problem."""
    targets = 2 * np.eye(classes)[labels] - 1
    penalty = np.sqrt(l2) * np.eye(features.shape[1])
    rows, wanted = np.vstack([features, penalty]), np.vstack([targets, np.zeros((features.shape[1], classes))])
    return np.linalg.lstsq(rows, wanted, rcond=None)[0]


def test_accuracy_by_brute_force():
    (x, y), (test_x, test_y) = blobs(200), blobs(160, seed=1)
    draws, seed = 2, 3
    wanted = []
    for draw in range(draws):
        rng = np.random.default_rng(hash((seed, draw)) % 2**31)
        chosen = np.concatenate([rng.permutation(np.flatnonzero(y.numpy() == label))[:10] for label in range(4)])
        held_out = np.setdiff1d(np.arange(200), chosen)
        shots = x[chosen].double().numpy()
        mean, std = shots.mean(0), shots.std(0) + 1e-5

        def white(features, mean=mean, std=std):
            return np.hstack([(features.double().numpy() - mean) / std, np.full((len(features), 1), 100.0)])

        def accuracy(weights, features, labels, white=white):
            return np.mean((white(features) @ weights).argmax(1) == labels.numpy())

        found = [ridge(white(x[chosen]), y[chosen].numpy(), 4, l2) for l2 in L2_REGULARISERS]
        best = np.argmax([accuracy(weights, x[held_out], y[held_out]) for weights in found])
        wanted.append(accuracy(found[best], test_x, test_y))
    assert 0.3 < np.mean(wanted) < 0.95
    assert few_shot_accuracy(x, y, test_x, test_y, seed=seed, draws=draws) == pytest.approx(np.mean(wanted))


def test_regulariser_is_chosen_on_every_class(monkeypatch):
    (x, y), (test_x, test_y) = blobs(2400), blobs(80, seed=1)
    order = y.argsort()  # class by class, as in a folder of images
    seen = []
    accuracies = fewshot._accuracies
    monkeypatch.setattr(fewshot, "_accuracies", lambda w, y, weights: seen.append(y) or accuracies(w, y, weights))
    few_shot_accuracy(x[order], y[order], test_x, test_y, draws=1)
    assert [len(labels) for labels in seen] == [1000, 80]
    assert seen[0].bincount().tolist() == pytest.approx([250] * 4, abs=2)


def test_accuracy_depends_on_the_seed_alone():
    (x, y), (test_x, test_y) = blobs(200), blobs(160, seed=1)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(found))
        found.append(few_shot_accuracy(x, y, test_x, test_y, seed=seed))
    assert found[0] == found[1] != found[2]


def test_separable_features_are_told_apart():
    (x, y), (test_x, test_y) = blobs(80, noise=0.01), blobs(40, noise=0.01, seed=1)
    assert few_shot_accuracy(x, y, test_x, test_y) == 1


def test_a_class_with_fewer_gives_all_it_has():
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    chosen = sample_shots(labels, 2, seed=0)
    assert labels[chosen].tolist() == [0, 0, 1, 2, 2] and len(set(chosen.tolist())) == 5


def test_shots_that_take_all_are_refused():
    x, y = blobs(12)
    with pytest.raises(ValueError, match="3 shots take all 12 training images"):
        few_shot_accuracy(x, y, x, y, shots=3)
