"""Counts the machine instructions of the CUDA kernels, and checks that a build spills no more than a CSV file allows.

    python scripts/sass_report.py build/venv/libcore_cuda.a                    # prints the table
    python scripts/sass_report.py --csv docs/cuda_kernels.csv FILE ...         # replaces the rows of these kernels
    python scripts/sass_report.py --check docs/cuda_kernels.csv FILE ...       # what .ci/run does
    python scripts/sass_report.py --path "few_of_rows_kernel<float, 4, 8>" 90 NNNNT FILE   # counts along a path

FILE is an object file, a fat binary, a library or an archive of nvcc. No GPU is needed. A row is a kernel on an
architecture:

    registers     per thread
    stack         bytes of local memory per thread: spilled registers, and arrays that a variable indexes
    shared        bytes of static shared memory
    instructions  of the whole kernel
    loop          of its longest innermost loop; the compiler may have unrolled it

--path counts the instructions that a warp executes from the start of a kernel to its end. The letters say for each
conditional branch or exit on the way, in order, whether it is taken (T) or not (N). It prints these branches.

cuobjdump of the CUDA toolkit disassembles the files. If it is missing, the script uses Triton's copy of cuobjdump,
which comes with torch for CUDA.
"""

from __future__ import annotations

import argparse
import csv
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SLACK = 1.1  # another compiler version may use up to this much more stack


class Kernel(NamedTuple):
    """The cost of a kernel on an architecture."""

    file: str
    kernel: str
    architecture: int
    registers: int
    stack: int
    shared: int
    instructions: int
    loop: int

    @property
    def key(self) -> tuple[str, str, int]:
        """File, name and architecture."""
        return self[:3]


@functools.cache
def cuobjdump() -> str:
    """Finds cuobjdump on PATH, in the toolkit or in Triton."""
    triton = importlib.util.find_spec("triton")
    folders = ["/usr/local/cuda/bin"]
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=":".join(folders))
    if not found:
        raise SystemExit("sass_report: cuobjdump was found neither on PATH, nor in /usr/local/cuda/bin, nor in Triton")
    return found


def dump(path: str, *options: str) -> str:
    """Runs cuobjdump on a file."""
    result = subprocess.run([cuobjdump(), *options, path], capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"sass_report: cuobjdump cannot read {path}: {result.stderr.strip()}")
    return result.stdout


def demangled(names: Iterable[str]) -> list[str]:
    """Demangles the names of C++ functions."""
    text = "\n".join(names)
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.split("\n")


def short_name(name: str) -> str:
    """Removes the return type, the namespaces and the parameters of a demangled name."""
    depth, end = 0, len(name)
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0 and not name.startswith("(anonymous namespace)", i):
            end = i
            break
    name = re.sub(r"\(anonymous namespace\)::|\bvmoe::(cuda::)?", "", name[:end]).removeprefix("void ")
    return re.sub(r"\((?:int|bool)\)|, +", lambda m: ", " if m[0][0] == "," else "", name)


def source_of(mangled: str) -> str:
    """Finds the .cu file in the name of its unnamed namespace; "" for functions of libraries."""
    match = re.match(r"_ZN4vmoe4cuda\d+_GLOBAL__N__[0-9a-f]+_(\d+)_(\w+)", mangled)
    return match[2][: int(match[1])].removesuffix("_cu") if match else ""


def longest_loop(addresses: list[int], branches: list[tuple[int, int]]) -> int:
    """Counts the instructions of the longest loop without an inner loop, from (address, target) of the branches."""
    spans = sorted({(target, at) for at, target in branches if target < at})
    innermost = [s for s in spans if not any(other != s and s[0] <= other[0] and other[1] <= s[1] for other in spans)]
    return max((sum(begin <= a <= end for a in addresses) for begin, end in innermost), default=0)


def sections(text: str) -> Iterator[tuple[int, str, str]]:
    """Divides the output of cuobjdump into (architecture, mangled name, lines) of its functions."""
    architecture = 0
    for part in re.split(r"(?m)^(?=\s*Function\b)|^(?=Fatbin )", text):
        if match := re.search(r"(?m)^arch = sm_(\d+)", part):
            architecture = int(match[1])
        if match := re.match(r"\s*Function[ :]+(\w+)", part):
            yield architecture, match[1], part


def resources(path: str) -> dict[tuple[int, str], tuple[int, int, int]]:
    """Reads registers, stack and static shared memory of every kernel, by architecture and mangled name."""
    found = {}
    for architecture, name, part in sections(dump(path, "-res-usage")):
        use = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED):(\d+)", part)}
        found[architecture, name] = use["REG"], use["STACK"], use["SHARED"]
    return found


def disassembled(path: str) -> dict[tuple[int, str], list[tuple[int, str]]]:
    """Reads the instructions of every kernel, as (address, text), by architecture and mangled name."""
    found = {}
    for architecture, name, part in sections(dump(path, "-sass")):
        code = re.findall(r"(?m)^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", part)
        found[architecture, name] = [(int(at, 16), text) for at, text in code if not re.search(r"\bNOP\b", text)]
    return found


def target_of(text: str) -> int | None:
    """Finds the address to which an instruction branches; None for other instructions and for BRA.DIV.

    BRA.DIV branches only if the lanes of the warp have diverged.
    """
    match = re.search(r"\bBRA\b(?!\.DIV).*?\b0x([0-9a-f]+)", text)
    return int(match[1], 16) if match else None


def counts(code: list[tuple[int, str]]) -> tuple[int, int]:
    """Counts the instructions of a kernel and of its longest loop."""
    branches = [(at, target) for at, text in code if (target := target_of(text)) is not None]
    return len(code), longest_loop([at for at, _ in code], branches)


def follow(code: list[tuple[int, str]], outcomes: str) -> tuple[int, list[str]]:
    """Counts the instructions that a warp executes, and lists the conditional branches and exits on the way."""
    step, executed, choices, left = 0, 0, [], list(outcomes)
    while True:
        at, text = code[step]
        executed, step = executed + 1, step + 1
        target, exits = target_of(text), "EXIT" in text
        if re.search(r"\b(CALL|RET|BRX)\b", text):
            raise SystemExit(f"sass_report: cannot follow {text!r} at {at:04x}")
        if target is None and not exits:
            continue
        taken = True
        if text.startswith("@") or re.search(r"BRA !?U?P\d", text):
            if not left:
                raise SystemExit("\n".join([*choices, f"sass_report: is {text!r} at {at:04x} taken? Add T or N."]))
            taken = left.pop(0) == "T"
            choices.append(f"{at:04x} {text}: {'taken' if taken else 'not taken'}")
        if taken and exits:
            return executed, choices
        if taken:
            step = next(i for i, (address, _) in enumerate(code) if address >= target)


def read(paths: Iterable[str], *, disassemble: bool) -> list[Kernel]:
    """Reads the kernels of compiled files, in order; without `disassemble` the instructions are 0."""
    kernels = set()
    for path in paths:
        use = resources(path)
        code = disassembled(path) if disassemble else {}
        ours = [key for key in use if source_of(key[1])]
        for (architecture, name), plain in zip(ours, demangled(name for _, name in ours), strict=False):
            key = architecture, name
            kernels.add(Kernel(source_of(name), short_name(plain), architecture, *use[key], *counts(code.get(key, []))))
    if not kernels:
        raise SystemExit(f"sass_report: no CUDA kernel of this package in {', '.join(paths)}")
    return sorted(kernels)


def count_path(paths: Iterable[str], kernel: str, architecture: str, outcomes: str) -> list[str]:
    """Counts the instructions on a path through a kernel, which is named as in the table."""
    for path in paths:
        code = disassembled(path)
        for key, plain in zip(code, demangled(name for _, name in code), strict=False):
            if key[0] == int(architecture) and short_name(plain) == kernel and source_of(key[1]):
                executed, choices = follow(code[key], outcomes)
                return [*choices, f"{executed} instructions"]
    raise SystemExit(f"sass_report: no kernel {kernel!r} for sm_{architecture} in {', '.join(paths)}")


def load(path: Path) -> dict[tuple[str, str, int], Kernel]:
    """Reads kept rows, by key."""
    with path.open(newline="") as file:
        rows = [Kernel(source, name, *map(int, more)) for source, name, *more in csv.reader(file) if source != "file"]
    return {row.key: row for row in rows}


def save(path: Path, kernels: Iterable[Kernel]) -> None:
    """Writes rows."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Kernel._fields)
        writer.writerows(kernels)


def faults(kernels: Iterable[Kernel], kept: dict[tuple[str, str, int], Kernel]) -> list[str]:
    """Names the kernels that spill more, or have more static shared memory, than their row allows."""
    found = []
    for kernel in kernels:
        row = kept.get(kernel.key)
        name = f"{kernel.file}: {kernel.kernel} (sm_{kernel.architecture})"
        if kernel.stack > SLACK * (row.stack if row else 0):
            allowed = f"its row has {row.stack}" if row else "it has no row"
            found.append(f"{name} uses {kernel.stack} bytes of stack per thread; {allowed}")
        if row and kernel.shared > row.shared:
            found.append(f"{name} has {kernel.shared} bytes of static shared memory; its row has {row.shared}")
    return found


def table(kernels: list[Kernel]) -> str:
    """Formats rows for a terminal."""
    lines = [Kernel._fields, *kernels]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(Kernel._fields))]

    def row(line: tuple) -> str:
        return "  ".join(f"{value!s:<{width}}" for value, width in zip(line, widths, strict=True))

    return "\n".join(row(line) for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Prints, keeps or checks the kernels of compiled files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--csv", type=Path, help="replace the rows of the sources and architectures of these files")
    group.add_argument("--check", type=Path, metavar="CSV", help="fail if a kernel spills more than its row")
    group.add_argument("--path", nargs=3, metavar=("KERNEL", "ARCHITECTURE", "LETTERS"))
    options = parser.parse_args(arguments)
    if options.path:
        print(*count_path(options.files, *options.path), sep="\n")
        return 0
    kernels = read(options.files, disassemble=options.check is None)
    if options.check:
        found = faults(kernels, load(options.check))
        print(*found, f"sass_report: {len(kernels)} kernels, {len(found)} faults", sep="\n")
        return 1 if found else 0
    if options.csv:
        replaced = {(kernel.file, kernel.architecture) for kernel in kernels}
        kept = load(options.csv).values() if options.csv.exists() else []
        save(options.csv, sorted([*(k for k in kept if (k.file, k.architecture) not in replaced), *kernels]))
    else:
        print(table(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
