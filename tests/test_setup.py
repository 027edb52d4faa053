"""Tests scripts/setup.sh with fakes of Python, pip and nvidia-smi: the compiled kernels, and the installed packages."""

import os
import runpy
import shutil
import stat
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "setup.sh"
STAND_IN = '#!/bin/sh\necho "$(basename "$0") $*" >>"$LOG"\n'


@pytest.fixture
def setup(tmp_path):
    """Runs the script in a folder with a .venv, and returns what was installed."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(SCRIPT, tmp_path / "scripts")
    (tmp_path / "beside").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)

    def program(path, text):
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    for name in ("python", "pip"):
        program(tmp_path / ".venv" / "bin" / name, STAND_IN)
    for name in ("python3", "c++", "apt-get"):
        program(tmp_path / "beside" / name, STAND_IN)

    def run(*extra, gpus=None, choice=None):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        smi = "exit 9" if gpus is None else f"printf '{gpus}'"
        program(tmp_path / "beside" / "nvidia-smi", f"#!/bin/sh\n{smi}\n")
        environment = {**os.environ, "PATH": f"{tmp_path / 'beside'}:{os.environ['PATH']}", "LOG": str(log)}
        environment.pop("VMOE_CUDA", None)
        if choice is not None:
            environment["VMOE_CUDA"] = choice
        done = subprocess.run(
            [tmp_path / "scripts" / "setup.sh", "python3", *extra], env=environment, capture_output=True, text=True
        )
        lines = [line for line in log.read_text().splitlines() if line.startswith(("python ", "apt-get"))]
        # The dependencies are installed beside the compilation. The package comes last in the returned list.
        return done, sorted(lines, key=lambda line: "--editable" in line)

    return run


def test_without_a_gpu_no_cuda_kernel_is_compiled(setup):
    for gpus in (None, "", "[N/A]\\n", "NVIDIA-SMI has failed\\n"):
        done, installed = setup(gpus=gpus)
        assert done.returncode == 0, done.stderr
        assert installed[-1].endswith("--editable . --config-settings=cmake.define.VMOE_CUDA=OFF")
        assert "no CUDA kernels" in done.stdout and "VMOE_CUDA=ON" in done.stdout


@pytest.mark.parametrize(
    ("gpus", "architectures"), [("9.0\\n", "90"), ("9.0\\n9.0\\n", "90"), ("9.0\\n8.0\\n10.0\\n", "100;80;90")]
)
def test_with_gpus_the_kernels_are_compiled_for_them(setup, gpus, architectures):
    _, installed = setup(gpus=gpus, choice="AUTO")
    option = "--config-settings=cmake.define"
    end = f"{option}.VMOE_CUDA=AUTO {option}.CMAKE_CUDA_ARCHITECTURES={architectures}"
    assert installed[-1].endswith(end)


def test_a_choice_overrides_the_gpus_of_the_machine(setup):
    for gpus in (None, "9.0\\n"):
        _, installed = setup(gpus=gpus, choice="ON")
        # No architecture is passed, because cmake/modules.cmake has the list.
        assert installed[-1].endswith(
            "--config-settings=cmake.define.VMOE_CUDA=ON --config-settings=cmake.args=-UCMAKE_CUDA_ARCHITECTURES"
        )
        _, installed = setup(gpus=gpus, choice="80;90")
        option = "--config-settings=cmake.define"
        assert installed[-1].endswith(f"{option}.VMOE_CUDA=ON {option}.CMAKE_CUDA_ARCHITECTURES=80;90")
        _, installed = setup(gpus=gpus, choice="OFF")
        assert installed[-1].endswith("--editable . --config-settings=cmake.define.VMOE_CUDA=OFF")
    done, installed = setup(choice="on")
    assert done.returncode == 1 and "VMOE_CUDA must be AUTO, ON, OFF or architectures" in done.stderr
    assert "got 'on'" in done.stderr and not installed


def test_only_the_tests_need_googletest(setup):
    _, installed = setup("study")
    assert not any("libgtest-dev" in line for line in installed)
    for extra in ("test", "lint,test"):
        _, installed = setup(extra)
        assert f"python scripts/requirements.py {extra}" in installed
        assert any(line.endswith("install --no-compile --quiet -r build/requirements.txt") for line in installed)
        if os.getuid() == 0 and not Path("/usr/include/gtest/gtest.h").exists():
            assert any("libgtest-dev" in line for line in installed)


def test_a_failed_installation_of_the_dependencies_ends_the_script(setup, tmp_path):
    pip = tmp_path / ".venv" / "bin" / "python"
    pip.write_text(f'{STAND_IN}case "$*" in *requirements.txt) exit 3;; esac\n')
    done, _ = setup("test")
    assert done.returncode == 3


def test_a_failed_build_ends_the_installation_of_the_dependencies(setup, tmp_path):
    pip = tmp_path / ".venv" / "bin" / "python"
    pip.write_text(f'{STAND_IN}case "$*" in *requirements.txt) exec sleep 60;; *--editable*) exit 4;; esac\n')
    start = time.monotonic()
    done, _ = setup("test")  # returns when no process has the script's standard output
    assert done.returncode == 4 and time.monotonic() - start < 50


def test_requirements_of_extras():
    requirements = runpy.run_path(str(SCRIPT.parent / "requirements.py"))["requirements"]
    assert requirements(["models"]) == ["torch>=2.11", "timm>=1.0.30", "torchvision>=0.26"]
    found = requirements(["test", "lint"])
    assert {"pytest", "ruff", "scipy>=1.11", "safetensors>=0.4.3", "pyright[nodejs]"} <= {*found}
    assert len(found) == len({*found}) and not any("vmoe_routers" in line for line in found)
