"""Evaluation on many ranks: every image counts once, and logits and metrics are as in one process."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run
from small_models import vit

from vmoe_routers.distributed import Meshes, padded_batches, parallelize
from vmoe_routers.training import evaluate_model

COUNTS = (1, 13, 27, 30)
ROUTERS = ("softmax_token_choice", "softmax_expert_choice", "soft")


@torch.no_grad()
def evaluated() -> dict[str, Any]:
    """Returns the number of images, right answers, summed loss, and the deviation of the logits from one process.

    The result also has the numbers of evaluate_model for every router.
    """
    found = {}
    for router in ROUTERS:
        alone = vit(router, group_size=1).eval()
        model = vit(router, group_size=1).eval()
        if dist.is_initialized():
            parallelize(model, Meshes.make("cpu", ep=2))
        for count in COUNTS:
            generator = torch.Generator().manual_seed(count)
            images = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
            labels = torch.randint(10, (count,), generator=generator)
            wanted, sums, difference = alone(images), torch.zeros(3, dtype=torch.float64), 0.0
            for index, real in padded_batches(count, 4):
                logits, label = model(images[index]), labels[index]
                loss = F.cross_entropy(logits, label, reduction="none")
                sums += torch.stack([real.sum(), (logits.argmax(1) == label)[real].sum(), loss[real].sum()])
                difference = max(difference, float((logits - wanted[index]).abs().max()))
            if dist.is_initialized():
                dist.all_reduce(sums)
            found[f"{router} {count}"] = [*sums.tolist(), difference]
        batches = ((images[index], labels[index], real) for index, real in padded_batches(COUNTS[-1], 4))
        found[f"{router} evaluated"] = numbers(asdict(evaluate_model(model, batches, 10)))
    return found


def numbers(value: Any, name: str = "") -> dict[str, float]:
    """Returns the numbers of a nested result, by their place in it."""
    if not isinstance(value, (dict, list)):
        return {} if value is None else {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {place: x for key, inner in items for place, x in numbers(inner, f"{name}.{key}").items()}


def test_every_image_counts_once():
    alone = run(0, evaluated)[0]
    for found in run(4, evaluated):
        for case, result in found.items():
            if case.endswith("evaluated"):
                result[".images_per_second"] = alone[case][".images_per_second"]
                assert result == pytest.approx(alone[case], rel=1e-10) and result[".images"] == 30
                assert any(place.startswith(".layers.blocks.") for place in result)
                continue
            count, right, loss, difference = result
            assert count == int(case.split()[1]) == alone[case][0]
            assert right == alone[case][1]
            assert abs(loss - alone[case][2]) < 1e-10 * max(loss, 1)
            assert difference < 1e-10


def test_padded_batches_in_one_process():
    batches = list(padded_batches(5, 2))
    assert [index.tolist() for index, _ in batches] == [[0, 1], [2, 3], [4]]
    assert all(real.all() for _, real in batches)
    with pytest.raises(ValueError, match="padded_batches: images must be an int of at least 1, got 0"):
        list(padded_batches(0, 2))
