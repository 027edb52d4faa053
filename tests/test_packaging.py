"""The build: the torch and the compiler that it needs, the symbols of _C, versions, and the contents of the sdist."""

import importlib.machinery
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import yaml

import vmoe_routers
from vmoe_routers import _C

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
find_torch = runpy.run_path(str(ROOT / "cmake" / "find_torch.py"))["main"]


@pytest.fixture
def torch_of(tmp_path, monkeypatch):
    """Lets Python find a folder with this version.py as torch."""
    folder = tmp_path / "torch"

    def install(text):
        folder.mkdir(exist_ok=True)
        (folder / "version.py").write_text(text)
        spec = importlib.machinery.ModuleSpec("torch", None, is_package=True)
        spec.submodule_search_locations = [str(folder)]
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
        return str(folder)

    return install


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1", "2.14.1+cpu", "3.0.0"])
def test_the_build_finds_torch(torch_of, version):
    assert find_torch() == str(Path(sys.modules["torch"].__file__).parent)
    folder = torch_of(f"from typing import Optional\n__version__ = '{version}'\n")
    assert find_torch() == folder


@pytest.mark.parametrize(("text", "words"), [
    ("__version__ = '2.10.1+cu128'\n", "found 2.10.1+cu128 in"),
    ("__version__ = '1.13.0'\n", "found 1.13.0 in"),
    ("", "found an unknown version in"),
])  # fmt: skip
def test_the_build_refuses_an_older_torch(torch_of, text, words):
    torch_of(text)
    with pytest.raises(SystemExit, match=f"needs torch >= 2.11 to build, and {re.escape(words)}.*pip install 'torch"):
        find_torch()


def test_the_build_says_that_torch_is_missing(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"finds no torch: pip install 'torch>=2\.11', or build"):
        find_torch()


def test_the_build_says_how_to_get_a_compiler(tmp_path):
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if not (cmake and ninja):
        pytest.skip("needs cmake and ninja")
    arguments = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    environment = {**os.environ, "CXX": str(tmp_path / "no-compiler")}
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    message = " ".join(done.stderr.split())
    assert done.returncode != 0 and "vmoe_routers needs a C++20 compiler" in message and "'apt install g++'" in message


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("nm"), reason="needs nm")
def test_the_module_exports_only_its_init_function():
    done = subprocess.run(["nm", "-D", "--defined-only", _C.__file__], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["PyInit__C"]


def test_readme_and_contributing_name_the_build_tools():
    """With --no-build-isolation, pip does not install the build tools."""
    wanted = {re.split("[<>=]", name)[0] for name in PROJECT["build-system"]["requires"]} - {"torch"}
    for page in ("README.md", "CONTRIBUTING.md", "scripts/setup.sh"):
        lines = [line for line in (ROOT / page).read_text().splitlines() if "install" in line and "pybind11" in line]
        assert lines
        for line in lines:
            assert {*wanted, "cmake", "ninja"} <= set(re.findall(r"[\w-]+", line)), f"{page}: {line}"
            assert page == "scripts/setup.sh" or f"cmake{PROJECT['tool']['scikit-build']['cmake']['version']}" in line


def test_lower_bounds_that_are_tested():
    """tests/lower_bounds.txt pins the bounds of the build and of the packages that the library imports."""
    extras = PROJECT["project"]["optional-dependencies"]
    named = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    named += [line for extra in ("models", "checkpoints", "study", "training") for line in extras[extra]]
    bounds = {re.match(r"[\w-]+", line)[0]: line.partition(">=")[2] for line in named if "vmoe_routers[" not in line}
    assert all(bounds.values()), f"without a lower bound: {[name for name, bound in bounds.items() if not bound]}"
    lines = (ROOT / "tests" / "lower_bounds.txt").read_text().splitlines()
    assert dict(line.split("==") for line in lines if not line.startswith("#")) == bounds


def test_workflows_call_what_exists():
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    files = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    if not files:
        pytest.skip("an sdist has no workflows")
    for file in files:
        for job in yaml.safe_load(file.read_text())["jobs"].values():
            for script in (step.get("run", "") for step in job["steps"]):
                for called in re.findall(r"\bmake ((?:[\w./-]+\b(?!=) ?)+)", script):
                    made = [name.partition("/")[2] for name in called.split() if name.startswith(".venv/")]
                    assert {*called.split()} <= {*targets, *(f".venv/{name}" for name in made)}, (
                        f"{file.name}: {called}"
                    )
                    assert {*made} <= PROJECT["project"]["optional-dependencies"].keys()


def test_version():
    assert re.match(r"\d+\.\d+\.\d+", vmoe_routers.__version__)


@pytest.fixture(scope="module")
def version_of():
    """Gives the version that a build in a folder has."""
    setuptools_scm = pytest.importorskip("setuptools_scm")

    def version_of(folder):
        shutil.copy(ROOT / "pyproject.toml", folder)
        code = (
            "from scikit_build_core.metadata.setuptools_scm import dynamic_metadata; print(dynamic_metadata('version'))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert setuptools_scm
    return version_of


def git(folder, *arguments):
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", folder, *author, *arguments], check=True, capture_output=True)


def test_version_from_the_tag(tmp_path, version_of):
    if not shutil.which("git"):
        pytest.skip("needs git")
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    git(origin, "init", "--quiet", "--initial-branch=main")
    shutil.copy(ROOT / "pyproject.toml", origin)
    git(origin, "add", ".")
    git(origin, "commit", "--quiet", "-m", "one")
    assert version_of(origin) == "0.1.0.dev1", "before the first tag"
    git(origin, "tag", "v0.1.0")
    assert version_of(origin) == "0.1.0"
    git(origin, "commit", "--quiet", "--allow-empty", "-m", "two")
    assert version_of(origin) == "0.2.0.dev1"
    git(tmp_path, "clone", "--quiet", "--depth=1", "--no-tags", origin.as_uri(), str(clone))
    assert version_of(clone) == "0.1.0.dev1", "a shallow clone without tags"


def test_version_without_git(tmp_path, version_of):
    assert version_of(tmp_path) == PROJECT["tool"]["setuptools_scm"]["fallback_version"]
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.2\nName: vmoe_routers\nVersion: 0.3.1\n")
    assert version_of(tmp_path) == "0.3.1", "an sdist"
    (tmp_path / "PKG-INFO").unlink()
    text = (ROOT / ".git_archival.txt").read_text()
    text = re.sub(r"\$Format:%\(describe[^$]*\$", "v0.4.0-0-gabcdef0", text)
    (tmp_path / ".git_archival.txt").write_text(re.sub(r"\$Format:%H\$", "abcdef0" * 5, text))
    assert version_of(tmp_path) == "0.4.0", "an archive of a tag, made by git"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Builds the sdist twice; returns both files."""
    build = pytest.importorskip("scikit_build_core.build")
    pytest.importorskip("setuptools_scm")
    folders = [tmp_path_factory.mktemp("sdist") for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # scikit-build-core calls setuptools-scm the older way
        patch.chdir(ROOT)
        patch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        patch.setenv("SETUPTOOLS_SCM_PRETEND_VERSION", "1.2.3")
        return [folder / build.build_sdist(str(folder)) for folder in folders]


def test_sdist_is_reproducible(sdist):
    first, second = (path.read_bytes() for path in sdist)
    assert sdist[0].name == "vmoe_routers-1.2.3.tar.gz" and first == second


def test_sdist_holds_what_a_build_and_the_tests_need(sdist):
    with tarfile.open(sdist[0]) as archive:
        names = {name.partition("/")[2]: archive.getmember(name).size for name in archive.getnames()}
    wanted = {"pyproject.toml", "CMakeLists.txt", "LICENSE", "CHANGELOG.md", "PKG-INFO", "tests/conftest.py"}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "vmoe_routers").rglob("*.py")}
    wanted |= {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    assert wanted <= names.keys()
    unwanted = (".ci/", ".github/", ".git_archival", "build/", "docs/benchmarks/", "notebooks/", "results/", "conda/")
    assert not [name for name in names if name.startswith(unwanted) or name.endswith((".so", ".pyc", ".png"))]
    assert sum(names.values()) < 7_000_000


def test_citation_has_what_bibtex_needs():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    cited = citation["preferred-citation"]
    assert citation["url"] == citation["repository-code"] == cited["url"] == PROJECT["project"]["urls"]["Repository"]
    assert all(cited[key] == citation[key] for key in ("title", "type", "authors"))
    assert isinstance(cited["year"], int)
    # A release adds both keys. So both are absent, or CHANGELOG has the version with this date.
    assert ("version" in citation) == ("date-released" in citation)
    if "version" in citation:
        heading = f"## {citation['version']} - {citation['date-released']}"
        assert heading in (ROOT / "CHANGELOG.md").read_text()
