"""scripts/gpu_check.sh with fakes of the GPU and of every program that it calls."""

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.sh"

# A fake Python: it prints a GPU's capability and a folder of packages, and can import all modules. The tests of the ops
# fail. pip, which builds the module, waits for the build of the kernels' tests to begin.
PYTHON = """#!/bin/bash
case "$*" in
  *capability*) echo 90 ;;
  *without-pip*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
  *print*sys.path*) echo /some/site-packages ;;
  *pip*install*) for i in {1..600}; do [ -e "$BESIDE/kernels" ] && exit 0; sleep 0.1; done; exit 1 ;;
  *pytest*--ignore=*) echo "one test failed"; exit 1 ;;
  *) echo "did $*" ;;
esac
"""
# Configures, and builds a program that prints its arguments.
CMAKE = """#!/bin/bash
touch "$BESIDE/kernels"
if [ "$1" = --build ]; then
  mkdir -p "$2/tests/cpp/cuda/gpu" && cp "$BESIDE/gpu_tests" "$2/tests/cpp/cuda/gpu/"
fi
"""
PROGRAMS = {
    "python": PYTHON,
    "cmake": CMAKE,
    "gpu_tests": "#!/bin/sh\necho ran $*\n",
    "compute-sanitizer": '#!/bin/sh\nshift 4\nexec "$@"\n',
    "nvidia-smi": "#!/bin/sh\n",
    "nvcc": "#!/bin/sh\n",
}
PARTS = ["machine", "build", "kernels", "googletest", "sinkhorn", "cuda", "ops", "bench", "memcheck"]


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)


class Check:
    def __init__(self, folder: Path):
        self.folder, self.out, self.work = folder, folder / "out", folder / "work"
        self.source = folder / "googletest"
        self.source.mkdir()
        (self.source / "CMakeLists.txt").touch()
        for name, text in PROGRAMS.items():
            write_program(folder / name, text)

    def __call__(self, *arguments, **options):
        command = [SCRIPT, "--out", self.out, "--work", self.work, "--python", self.folder / "python", *arguments]
        environment = {**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}", "BESIDE": str(self.folder)}
        options = {"env": environment, "capture_output": True, "text": True, **options}
        return subprocess.run(command, **options)

    def summary(self) -> dict[str, str]:
        return {line.split()[0]: line for line in (self.out / "summary.txt").read_text().splitlines()}

    def log(self, part: str) -> str:
        return (self.work / f"{part}.log").read_text()


@pytest.fixture
def check(tmp_path):
    return Check(tmp_path)


def test_a_failed_part_does_not_stop_later_parts(check):
    done = check("--googletest", check.source)
    assert done.returncode == 1
    lines = check.summary()
    assert set(lines) == {*PARTS, "layers", "racecheck", "initcheck"}
    for name, line in lines.items():
        assert ("failed (1)" if name == "ops" else "passed") in line
        assert f"== {name}\ntimeout " in (check.out / "log.txt").read_text()
        assert re.search(rf"gpu_check: {name} (passed|failed \(1\)) in \d+ s", done.stdout)
    assert {file.name for file in check.out.iterdir()} == {"summary.txt", "log.txt"}  # the fake benchmark writes none
    assert lines["ops"].endswith("one test failed") and "one test failed" in done.stdout
    assert "--device cuda --csv" in lines["bench"] and "--quick" not in lines["bench"]
    assert lines["googletest"].endswith("ran --gtest_brief=1 --gtest_filter=-*Sinkhorn*")
    assert lines["sinkhorn"].endswith("ran --gtest_filter=*Sinkhorn*")


def test_a_quick_run_has_the_short_parts(check):
    check("--quick", "--googletest", check.source)
    lines = check.summary()
    assert set(lines) == set(PARTS)
    assert "--quick --no-compile --device cuda" in lines["bench"]
    assert lines["memcheck"].endswith("--gtest_filter=-*Large*:*Long*")


def test_succeeds_if_every_part_passes(check):
    write_program(check.folder / "python", PYTHON.replace("exit 1", "exit 0"))
    done = check("--googletest", check.source)
    assert done.returncode == 0, done.stdout


def commands(text: str) -> list[str]:
    """Returns the commands of a log or of a dry run, without their seconds."""
    return [re.sub(r"=10 \d+", "", line) for line in text.splitlines() if line.startswith("timeout --signal=INT")]


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_a_dry_run_prints_the_commands_and_runs_none(check, quick):
    dry = check(*quick, "--dry-run", "--googletest", check.source)
    assert dry.returncode == 0 and not dry.stderr and not check.out.exists() and not check.work.exists()
    check(*quick, "--googletest", check.source)
    ran = [command for log in check.work.glob("*.log") for command in commands(log.read_text())]
    assert ran and sorted(ran) == sorted(commands(dry.stdout))


def test_a_quick_run_ends_within_four_minutes(check):
    dry = check("--quick", "--dry-run", "--googletest", check.source).stdout
    limits = {name: int(limit) for name, limit in re.findall(r"^# (\w+): at most (\d+) s$", dry, re.MULTILINE)}
    assert list(limits) == PARTS
    assert limits["kernels"] == limits["build"]  # side by side
    total = re.search(r"^# all parts together: at most (\d+) s$", dry, re.MULTILINE)
    assert total and int(total[1]) + 10 <= 240
    # The builds and the tests of the kernels leave time for later parts.
    assert sum(limits[name] for name in ("machine", "build", "googletest", "sinkhorn")) < int(total[1]) - 50


def test_builds_without_setuptools_scm(check):
    """The script writes its own setuptools_scm into the new environment, which gives the build backend a version."""
    no_scm = '[ "$2" = "import setuptools_scm" ] && exit 1\ncase'
    write_program(check.folder / "python", PYTHON.replace("case", no_scm, 1))
    check("--quick")
    script, module = SCRIPT.read_text(), {}
    exec(script[script.index("\nclass Configuration") : script.index('\n""")')], module)
    config = module["Configuration"].from_file("pyproject.toml")
    version = module["_get_version"](config, force_write_version_files=True)
    assert f'fallback_version = "{version}"' in (SCRIPT.parents[1] / "pyproject.toml").read_text()
    assert " 0 /some/site-packages" in check.log("build")


def test_a_dry_run_needs_no_gpu(check):
    write_program(check.folder / "python", PYTHON.replace("echo 90", "exit 1"))
    dry = check("--dry-run")
    assert dry.returncode == 0 and "no GPU here" in dry.stdout and "CUDA_ARCHITECTURES=90" in dry.stdout


def test_a_part_that_is_cut_off_keeps_its_tracebacks(check):
    write_program(
        check.folder / "gpu_tests",
        """#!/bin/bash
case "$*" in
  *=-*Sinkhorn*) trap 'echo a traceback; exit 2' INT; echo began; touch "$BESIDE/began"; sleep 60 & wait ;;
esac
""",
    )
    # Only the test that hangs reaches its time limit: after the test has begun, SIGALRM ends the wait of timeout.
    hurry = f"""#!/bin/bash
real={shutil.which("timeout")}
case "$*" in
  *=-*Sinkhorn*)
    set -m  # otherwise a program in the background ignores SIGINT
    $real "$@" &
    until [ -e "$BESIDE/began" ]; do sleep 0.05; done
    kill -ALRM $!
    wait $!
    ;;
  *) exec $real "$@" ;;
esac
"""
    write_program(check.folder / "timeout", hurry)
    done = check("--quick", "--googletest", check.source)
    lines = check.summary()
    assert done.returncode == 1
    assert "cut off" in lines["googletest"] and lines["googletest"].endswith("a traceback")
    assert re.search(r"began\na traceback\n# \d+ s\n$", check.log("googletest"))
    assert "passed" in lines["sinkhorn"]


def test_the_programs_beside_python_precede_the_programs_of_the_system(check, tmp_path):
    beside = tmp_path / "environment"
    beside.mkdir()
    write_program(beside / "python", PYTHON)
    write_program(beside / "cmake", '#!/bin/sh\ntouch "$BESIDE/kernels"\nexit 4\n')
    check("--python", beside / "python", "--googletest", check.source)
    lines = check.summary()
    assert "failed (4)" in lines["kernels"]
    assert "googletest" not in lines and "skipped" in lines["sanitizers"] and "passed" in lines["cuda"]


def test_an_option_names_the_source_of_googletest(check):
    given = "-DCMAKE_DISABLE_FIND_PACKAGE_GTest=ON -DFETCHCONTENT_SOURCE_DIR_GOOGLETEST="
    dry = check("--dry-run", "--googletest", "googletest", cwd=check.folder)
    assert f"{given}{check.source} " in dry.stdout  # CMake takes no relative path
    standard = Path("/usr/src/googletest/CMakeLists.txt").exists()
    assert (f"{given}/usr/src/googletest " in check("--dry-run").stdout) == standard
    for wrong in ("elsewhere", "out"):
        (check.folder / "out").mkdir(exist_ok=True)
        done = check("--googletest", wrong, cwd=check.folder)
        assert done.returncode == 2 and f"--googletest {wrong} has no CMakeLists.txt" in done.stderr


def test_paths_are_relative_to_the_folder_of_the_caller(check):
    relative = check("--dry-run", "--out", "out", "--work", "work", "--python", "./python", cwd=check.folder)
    assert relative.returncode == 0 and relative.stdout == check("--dry-run").stdout


def test_refuses_unknown_options(check):
    for arguments in (["--fast"], ["--out"], ["--fast", "2"]):
        done = check(*arguments)
        assert done.returncode == 2 and "unknown option" in done.stderr


def test_without_a_gpu_the_message_says_so(tmp_path):
    done = subprocess.run([SCRIPT, "--out", tmp_path, "--python", "/bin/false"], capture_output=True, text=True)
    assert done.returncode == 1 and "no torch that sees a GPU" in done.stderr
