"""Every benchmark case builds at a tiny size, and each of its variants computes the right result."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import overhead, recording
from benchmarks.case import BACKWARD, ROLES, Size, Variant
from benchmarks.cases import entries
from benchmarks.compare import applies, check, mismatch, runner
from benchmarks.report.targets import AIMS, WHY, Target
from vmoe_routers import ROUTERS, ops, token_choice

ROOT = Path(__file__).parents[2]


def measured(entry):
    """Returns the dtypes of the entry's sizes."""
    return {size.dtype for size in (entry.default, *entry.cuda)}


TINY = Size(images=2, tokens=48, experts=4, width=16)
EVERY = entries(device="cuda")  # includes the entries for CPUs
TINIES = [(i, replace(TINY, dtype=dtype)) for i, entry in enumerate(EVERY) for dtype in sorted(measured(entry))]


@pytest.fixture(params=TINIES, ids=lambda tiny: f"{tiny[0]}-{tiny[1].dtype}")
def case(request):
    index, size = request.param
    return EVERY[index].build(size, "cpu")


def test_on_a_cpu_everything_is_float32_and_on_cuda_most_is_bfloat16_too():
    assert all({entry.default.dtype, entry.quick.dtype} == {"float32"} for entry in EVERY)
    both = {entry.op for entry in EVERY if "bfloat16" in measured(entry)}
    assert both == {"topk", "expert_choice", "dispatch", "grouped_mlp", "soft_mix", "layer"}
    assert {size.dtype for entry in EVERY for size in entry.cuda} == {"float32", "bfloat16"}


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton")
def test_triton_computes_the_same_as_ours():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    script = Path(__file__).with_name("triton_on_cpu.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.stdout == "15 checked\n", done.stderr


@pytest.mark.filterwarnings("ignore")  # warnings of the compared packages
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
    titles = [entry.build(TINY, "cpu").title for entry in EVERY]
    for aim in AIMS:
        assert any(title.startswith(aim.title) for title in titles), aim
    assert {aim.direction for aim in AIMS if isinstance(aim, Target)} == {"forward", BACKWARD}
    held = {(aim.direction, aim.against) for aim in AIMS}
    for title, *against in WHY:
        assert tuple(against) in held and any(case.startswith(title) for case in titles), title


def test_a_target_of_a_gpu_is_about_a_size_that_a_quick_run_has_and_about_a_variant():
    for aim in (aim for aim in AIMS if aim.device == "cuda"):
        cases = [e.build(replace(TINY, dtype=aim.size.dtype), "cpu") for e in EVERY if aim.size in e.cuda_quick]
        mine = [case for case in cases if case.title.startswith(aim.title)]
        assert mine, aim
        assert not isinstance(aim, Target) or all(aim.versus in {v.name for v in case.variants} for case in mine)


def test_every_op_has_an_overhead_case_and_every_router_a_layer():
    titles = {entry.build(entry.default, "cpu").title for entry in entries("overhead")}
    assert titles == {f"call of {op}, tiny input" for op in ops.__all__} | {f"tiny layer, {name}" for name in ROUTERS}


def test_cost_of_recording():
    seconds, ratios = recording.measure("soft", rounds=1, width=8, images=1)
    assert seconds > 0 and len(ratios) == len(recording.CALLS) and all(ratio.median > 0 for ratio in ratios)


def test_overhead_of_layers_counts_python_calls_and_checks(capsys):
    threads = torch.get_num_threads()
    overhead.main(["--rounds", "1"])
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == [name for name in ROUTERS for _ in overhead.CALLS]
    assert all(int(line.split()[-2]) > int(line.split()[-1]) > 0 for line in lines)


def test_python_calls_are_those_of_the_package():
    routing = token_choice(torch.rand(1, 4, 2), 1, 2)
    every, checks = overhead.python_calls(lambda: routing.dispatch(torch.randn(1, 4, 8)))
    assert every > checks > 0
    assert overhead.python_calls(lambda: torch.randn(3).sum()) == (0, 0)
