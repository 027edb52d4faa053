"""Checks a wheel: contents, size, symbols, paths, import time, and the quick tests against the installed wheel.

``python scripts/check_wheel.py dist/*.whl`` checks the file. ``--python PYTHON``, which may be given several times, is
an environment with torch, torchvision, timm, pytest and hypothesis. The script installs the wheel there, in place of an
earlier version, and runs the tests in a folder without the source tree. ``--installed`` does the same with the Python
that runs the script, and installs nothing.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_BYTES = 4 << 20  # a CPU wheel is 1.2 MB
MOST_BYTES_CUDA = 64 << 20
MOST_SECONDS = 1.5  # limit of the processor time to import the package after torch; 0.4 s when measured
QUICK = ("test_import.py", "test_moe.py", "test_experts.py", "ops", "routers")
SLOW = "compile or export or opcheck or hostile or gradcheck"  # parts of the names of tests that take seconds each


def main() -> int:
    """Runs the checks of the command line; returns 1 if a file has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, nargs="*")
    parser.add_argument("--python", action="append", default=[], metavar="PYTHON")
    parser.add_argument("--installed", action="store_true", help="test the package that this Python has installed")
    arguments = parser.parse_args()
    faults = [f"{wheel.name}: {fault}" for wheel in arguments.wheel for fault in check_file(wheel)]
    for fault in faults:
        print(fault, file=sys.stderr)
    if faults:
        return 1
    for python in arguments.python:
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        for wheel in arguments.wheel:
            subprocess.run([*install, "--force-reinstall", str(wheel)], check=True)
        check_installed(python)
    if arguments.installed:
        check_installed(sys.executable)
    return 0


def check_file(path: Path) -> list[str]:
    """Returns the faults of a wheel, without installing it."""
    with zipfile.ZipFile(path) as wheel:
        contents = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("/")}
    faults = []
    modules = {name: data for name, data in contents.items() if re.search(r"/_C\w*\.[^/]*(so|pyd)$", name)}
    package = {f"vmoe_routers/{file.relative_to(ROOT / 'vmoe_routers').as_posix()}" for file in sources()}
    metadata = {name for name in contents if name.partition("/")[0].endswith(".dist-info")}
    faults += [f"{name} is missing" for name in sorted(package - contents.keys())]
    foreign = contents.keys() - package - metadata - {*modules}
    faults += [f"{name} does not belong in a wheel" for name in sorted(foreign)]
    if not any("/_C." in name for name in modules):
        faults.append("the module _C is missing")
    if not any(name.endswith("/licenses/LICENSE") for name in metadata):
        faults.append("the licence is missing")
    has_cuda = any("/_C_cuda." in name for name in modules)
    most = MOST_BYTES_CUDA if has_cuda else MOST_BYTES
    if path.stat().st_size > most:
        faults.append(f"{path.stat().st_size:,} bytes, wanted at most {most:,}")
    version = path.name.split("-")[1]
    text = next((data.decode() for name, data in contents.items() if name.endswith(".dist-info/METADATA")), "")
    if f"\nVersion: {version}\n" not in text:
        faults.append(f"the metadata is of another version than {version}")
    for name, data in modules.items():
        found = {word.decode() for word in re.findall(rb"/(?:home|root|tmp|Users|builds?|work)/[\w./-]{3,}", data)}
        faults += [f"{name} names {path} of the machine that built it" for path in sorted(found)]
        if name.endswith(".so") and data[:4] == b"\x7fELF":
            exported = exported_symbols(data)
            init = f"PyInit_{name.rpartition('/')[2].partition('.')[0]}"
            if exported != [init]:
                faults.append(f"{name} exports {len(exported)} symbols, {', '.join(exported[:3])}; wanted {init} alone")
    return faults


def sources() -> list[Path]:
    """Lists the files of the package in the source tree."""
    files = (ROOT / "vmoe_routers").rglob("*")
    return [file for file in files if file.suffix in (".py", ".pyi") or file.name == "py.typed"]


def exported_symbols(module: bytes) -> list[str]:
    """Lists the global symbols that a shared library defines for the dynamic linker."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(module)
        file.flush()
        done = subprocess.run(["nm", "-D", "--defined-only", file.name], capture_output=True, text=True, check=True)
    symbols = [line.split()[-2:] for line in done.stdout.splitlines()]
    return [name for kind, name in symbols if kind.isupper()]


def check_installed(python: str) -> None:
    """Measures the import of the installed package and runs the quick tests. Raises CalledProcessError at a failure."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import time, torch; start = time.process_time(); import vmoe_routers; "
            "print(time.process_time() - start, torch.__version__, vmoe_routers.__file__)"
        )
        done = subprocess.run([python, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
        seconds, torch, file = done.stdout.split()
        print(f"{python}: torch {torch}, import {float(seconds):.2f} s after torch, {file}", flush=True)
        if float(seconds) > MOST_SECONDS:
            raise SystemExit(f"the import takes {seconds} s of processor time, wanted at most {MOST_SECONDS} s")
        if Path(file).is_relative_to(ROOT / "vmoe_routers"):
            raise SystemExit(f"{file} is the source tree")
        shutil.copytree(ROOT / "tests", Path(folder) / "tests", ignore=shutil.ignore_patterns("cpp", "__pycache__"))
        shutil.copytree(ROOT / "docs", Path(folder) / "docs")
        shutil.copy(ROOT / "pyproject.toml", folder)
        paths = [f"tests/{name}" for name in QUICK]
        options = ["-p", "no:cacheprovider", "-k", f"not ({SLOW})"]
        subprocess.run([python, "-m", "pytest", *options, *paths], cwd=folder, check=True)


if __name__ == "__main__":
    sys.exit(main())
