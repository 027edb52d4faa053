"""Every case builds at a tiny size, and every variant of it computes what it says."""

import pytest
import torch

from benchmarks.case import BACKWARD, ROLES, Size, Variant
from benchmarks.cases import entries
from benchmarks.compare import applies, check, mismatch, runner
from benchmarks.targets import TARGETS

TINY = Size(images=2, tokens=48, experts=4, width=16)


@pytest.fixture(params=range(len(entries())))
def case(request):
    return entries()[request.param].build(TINY, "cpu")


@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_variants_compute_the_same_as_ours(case):
    assert case.variants[0].name == "ours" and not case.variants[0].different
    assert len({v.name for v in case.variants}) == len(case.variants)
    for direction in case.floors:
        for variant in (v for v in case.variants if applies(v, direction)):
            assert variant.role in ROLES
            check(case, variant, direction)
            runner(variant, direction)()


def test_a_wrong_variant_is_found():
    case = entries("topk")[0].build(TINY, "cpu")
    wrong = Variant("wrong", "index", lambda: [2 * x for x in case.variants[0].call()], case.variants[0].leaves)
    for direction in case.floors:
        with pytest.raises(AssertionError, match="wrong"):
            check(case, wrong, direction)


def test_mismatch_counts_entries_and_refuses_shapes():
    assert mismatch(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), 1e-3) == 0.5
    assert mismatch(torch.tensor([torch.nan]), torch.tensor([1.0]), 1e-3) == 1
    assert mismatch(torch.tensor([1, 2]), torch.tensor([1, 2], dtype=torch.int32), 0) == 0
    with pytest.raises(AssertionError, match="shape"):
        mismatch(torch.zeros(2), torch.zeros(3), 1e-3)


def test_every_target_is_about_a_case():
    titles = [entry.build(TINY, "cpu").title for entry in entries()]
    for target in TARGETS:
        assert any(title.startswith(target.title) for title in titles), target
    assert {target.direction for target in TARGETS} == {"forward", BACKWARD}
