"""scripts/sass_report.py: the numbers that it reads from cuobjdump's output, and the kernels that it refuses."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("sass_report", ROOT / "scripts" / "sass_report.py")
assert spec and spec.loader
report = importlib.util.module_from_spec(spec)
spec.loader.exec_module(report)

MANGLED = "_ZN4vmoe4cuda53_GLOBAL__N__5f2b7a1c_15_softmax_topk_cu_1a2b3c4d_5678{}"
NAME = MANGLED.format("18few_of_rows_kernelIfLi4ELi8EEEvPKT_i")
USAGE = f"""
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function {NAME}:
  REG:30 STACK:16 SHARED:64 LOCAL:0 CONSTANT[0]:376 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN3cub17CUB_300001_SM_80011EmptyKernelIvEEvv:
  REG:4 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:352 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# A loop of four instructions in a loop of six, and the endless loop after the end of every kernel.
CODE = f"""
Fatbin elf code:
================
arch = sm_80
		Function : {NAME}
        /*0000*/                   MOV R1, c[0x0][0x28] ;    /* 0x00000a0000017a02 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;   /* 0x0000000102027810 */
        /*0020*/                   FADD R0, R0, R3 ;         /* 0x0000000300007221 */
        /*0030*/                   FADD R0, R0, R4 ;         /* 0x0000000400007221 */
        /*0040*/                   ISETP.NE.AND P0, PT, R2 ; /* 0x000000ff0200720c */
        /*0050*/              @!P0 BRA 0x20 ;                /* 0xffffffc000008947 */
        /*0060*/               @P1 BRA 0x10 ;                /* 0xffffffa000001947 */
        /*0070*/                   EXIT ;                    /* 0x000000000000794d */
        /*0080*/                   BRA 0x80;                 /* 0xfffffff000007947 */
        /*0090*/                   NOP;                      /* 0x0000000000007918 */
"""


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(report, "dump", lambda path, option: USAGE if option == "-res-usage" else CODE)
    (kernel,) = report.read(["build.a"], disassemble=True)
    return kernel


def test_reads_the_kernels_of_this_package(kernel):
    name = "few_of_rows_kernel<float, 4, 8>"
    assert kernel == report.Kernel("softmax_topk", name, 80, 30, 16, 64, instructions=9, loop=4)


@pytest.mark.parametrize(
    ("kept", "fault"),
    [
        ({}, "16 bytes of stack per thread; it has no row"),
        ({"stack": 8}, "16 bytes of stack per thread; its row has 8"),
        ({"stack": 16, "shared": 0}, "64 bytes of static shared memory; its row has 0"),
        ({"stack": 15, "registers": 1, "instructions": 1}, None),
    ],
)
def test_refuses_a_kernel_that_spills_more_than_its_row(kernel, kept, fault):
    rows = {kernel.key: kernel._replace(**kept)} if kept else {}
    found = report.faults([kernel], rows)
    assert len(found) == (fault is not None)
    assert all(fault in line and "softmax_topk: few_of_rows_kernel<float, 4, 8> (sm_80)" in line for line in found)


def test_replaces_the_rows_of_the_same_source_and_architecture(kernel, tmp_path):
    path = tmp_path / "kernels.csv"
    others = [kernel._replace(architecture=90), kernel._replace(file="topk")]
    report.save(path, [kernel._replace(kernel="gone"), *others])
    assert report.main(["--csv", str(path), "build.a"]) == 0
    assert set(report.load(path).values()) == {kernel, *others}
    assert report.main(["--check", str(path), "build.a"]) == 0


def test_without_a_kernel_it_fails(monkeypatch):
    monkeypatch.setattr(report, "dump", lambda path, option: "")
    with pytest.raises(SystemExit, match=r"no CUDA kernel of this package in build\.a"):
        report.main(["build.a"])


def test_the_kept_rows_name_every_kernel():
    """The rows name the kernels of the sources. After a change of names, `scripts/sass_report.py --csv` writes them."""
    rows = report.load(ROOT / "docs" / "cuda_kernels.csv").values()
    kept = {(row.file, row.architecture): set() for row in rows}
    for row in rows:
        kept[row.file, row.architecture].add(row.kernel.split("<")[0])
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        kernels = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", source.read_text()))
        for architecture in (80, 90):
            assert kernels <= kept[source.stem, architecture], (source.name, architecture)


@pytest.mark.parametrize(("letters", "executed"), [("NN", 8), ("TNN", 12), ("NTTNN", 18)])
def test_counts_the_instructions_along_a_path(monkeypatch, letters, executed):
    monkeypatch.setattr(report, "dump", lambda path, option: CODE)
    lines = report.count_path(["build.a"], "few_of_rows_kernel<float, 4, 8>", "80", letters)
    assert lines[-1] == f"{executed} instructions"
    assert len(lines) == len(letters) + 1
    assert lines[0] == f"0050 @!P0 BRA 0x20: {'taken' if letters[0] == 'T' else 'not taken'}"


@pytest.mark.parametrize(
    ("name", "letters", "message"), [("few_of_rows_kernel<float, 4, 8>", "N", "0060 taken"), ("x", "", "no kernel 'x'")]
)
def test_says_which_branch_of_a_path_is_open(monkeypatch, name, letters, message):
    monkeypatch.setattr(report, "dump", lambda path, option: CODE)
    with pytest.raises(SystemExit, match=message):
        report.count_path(["build.a"], name, "80", letters)
