"""scripts/gpu_check.sh where everything that it calls only pretends: what it says of the parts."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"

# Asked for the GPU's capability, for folders of packages, for modules; as pytest it fails, else it does its work.
PYTHON = """#!/bin/sh
case "$*" in
  *capability*) echo 90 ;;
  *without-pip*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  *sys.path*) echo /some/site-packages ;;
  *purelib*) echo "$(dirname "$0")" ;;
  *pytest*tests/ops*) echo "one test failed"; exit 1 ;;
  *benchmarks.run*) echo "$@" ;;
  *) echo "did $*" ;;
esac
"""
PROGRAMS = {"python": PYTHON, "nvidia-smi": "#!/bin/sh\n", "nvcc": "#!/bin/sh\n", "cmake": "#!/bin/sh\nexit 3\n"}


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.fixture
def check(tmp_path):
    for name, text in PROGRAMS.items():
        write_program(tmp_path / name, text)

    def run(*arguments):
        command = [SCRIPT, "--out", tmp_path / "out", "--python", tmp_path / "python", *arguments]
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


def test_every_part_reports_whatever_became_of_the_others(check, tmp_path):
    done = check("--googletest", "/some/source")
    assert done.returncode == 1
    lines = {line.split()[0]: line for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()}
    for name in ("machine", "build", "layers", "bench"):
        assert "passed" in lines[name], lines[name]
        assert (tmp_path / "out" / f"{name}.log").exists()
    assert "failed (1)" in lines["ops"] and lines["ops"].endswith("one test failed")
    assert "failed (3)" in lines["kernels"] and "googletest" not in lines
    assert "one test failed" in done.stdout
    assert "--device cuda --csv" in lines["bench"] and "--quick" not in lines["bench"]


def test_the_programs_beside_python_go_before_the_systems(check, tmp_path):
    beside = tmp_path / "environment"
    beside.mkdir()
    write_program(beside / "python", PYTHON)
    write_program(beside / "cmake", "#!/bin/sh\nexit 4\n")
    check("--python", beside / "python", "--googletest", "/some/source")
    lines = {line.split()[0]: line for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()}
    assert "failed (4)" in lines["kernels"]


def test_refuses_what_it_does_not_know(check):
    for arguments in (["--fast"], ["--out"], ["--fast", "2"]):
        done = check(*arguments)
        assert done.returncode == 2 and "do not know" in done.stderr


def test_without_a_gpu_it_says_so(tmp_path):
    done = subprocess.run([SCRIPT, "--out", tmp_path, "--python", "/bin/false"], capture_output=True, text=True)
    assert done.returncode == 1 and "no torch that sees a GPU" in done.stderr
