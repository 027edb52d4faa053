"""Measures the tests by mutants: changes one operator, number or statement at a time, and runs the tests that reach it.

``python scripts/mutate.py python`` mutates the functions of the routers, the losses and the ops, and runs pytest.
``python scripts/mutate.py cpp`` mutates the CPU kernels `KERNELS`, and runs their GoogleTest. It compiles a mutant for
one ISA level, v3, and links it with the objects of all other files. It needs ninja.

Both commands take `--count` mutants per file. The choice depends on the text of the mutants alone, so the choice
changes only if the file changes. Every row of the CSV file in tests/mutants is a mutant:

- killed: a test fails, or the tests exceed the limits of time or memory;
- survived: no test fails. The column `why`, written by hand, explains why none should; later runs keep it;
- not reached: no test calls the function. The mutant counts as survived;
- not compiled: no compilable mutant, or a mutant without a difference. It is not counted.

``--survivors`` runs the survivors again, and ``--report`` prints the score of the kept rows. The source tree never
changes. Python mutants run in forks of one process, which has collected the tests. Python 3.11 or later.
"""

from __future__ import annotations

import argparse
import ast
import csv
import datetime
import gc
import hashlib
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutants"
ISA = "v3"
KERNELS = ("softmax_topk", "ksparse_projection", "assign_slots", "combine", "sinkhorn")
NOT_RUN = ("test_hostile", "test_cuda")  # start processes
SLOW = "compile or export or opcheck or the_table"  # parts of the names of slow tests
MEMORY = 8 << 30
SURVIVED = ("survived", "not reached")
COLUMNS = ("file", "line", "before", "after", "result", "date", "why")


class Mutant(NamedTuple):
    """One change of one file.

    Attributes:
        file: Path relative to the root.
        line: Number of the changed line.
        before, after: The line without indentation, in the file and in the mutant.
        source: The whole mutated file.
    """

    file: str
    line: int
    before: str
    after: str
    source: str

    def rank(self) -> bytes:
        """Returns a value that orders mutants at random, with the same order in every run."""
        return hashlib.sha256(f"{self.file}\0{self.before}\0{self.after}".encode()).digest()


# Mutants of Python.

_COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq}
_COMPARE |= {ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}
_BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
_BINARY |= {ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "larger": "smaller", "smaller": "larger"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def python_files() -> list[str]:
    """Lists the files that are mutated."""
    files = sorted(file for folder in ("ops", "routers") for file in (ROOT / "vmoe_routers" / folder).glob("*.py"))
    return [str(file.relative_to(ROOT)) for file in files if file.name not in ("__init__.py", "_cuda.py")]


def python_mutants(file: str) -> list[Mutant]:
    """Lists the mutants of the functions of a file. Messages, annotations and defaults are not mutated."""
    text = (ROOT / file).read_text()
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line.encode()))
    code = text.encode()
    mutants = []
    for node, new in _changes(ast.parse(text)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        added = "\n" * (node.end_lineno - node.lineno)  # all later lines keep their numbers
        new = f"{new[:-1]}{added})" if isinstance(node, ast.expr) and added else new + added
        source = (code[:begin] + new.encode() + code[end:]).decode()
        before = b"".join(line.encode() for line in lines[node.lineno - 1 : node.end_lineno]).decode()
        offset = starts[node.lineno - 1]
        after = before.encode()[: begin - offset] + new.encode() + before.encode()[end - offset :]
        squeeze = [" ".join(part.split()) for part in (before, after.decode())]
        mutants.append(Mutant(file, node.lineno, *squeeze, source))
    return mutants


def _changes(node: ast.AST, inside: bool = False) -> Iterator[tuple[Any, str]]:
    """Yields the changes below a node: an expression or statement, and its new text."""
    if not inside:
        pass
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        yield node, f"({ast.unparse(ast.Compare(node.left, [_COMPARE[type(node.ops[0])]()], node.comparators))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        yield node, f"({ast.unparse(ast.BinOp(node.left, _BINARY[type(node.op)](), node.right))})"
    elif isinstance(node, ast.BoolOp):
        other = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield node, f"({ast.unparse(ast.BoolOp(other, node.values))})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node, f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.IfExp):
        yield node, f"({ast.unparse(ast.IfExp(node.test, node.orelse, node.body))})"
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        yield node, _NAMES[node.id]
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        yield node, repr(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.AugAssign) and type(node.op) in _BINARY:
        yield node, ast.unparse(ast.AugAssign(node.target, _BINARY[type(node.op)](), node.value))
    elif isinstance(node, (ast.If, ast.While)):
        yield node.test, f"(not ({ast.unparse(node.test)}))"
    elif isinstance(node, (ast.Raise, ast.Continue, ast.Break, ast.Expr)) and not _is_docstring(node):
        yield node, "pass"
    if isinstance(node, (ast.Raise, ast.JoinedStr)):
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or (name == "args" and isinstance(node, _FUNCTIONS)):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _changes(child, inside or isinstance(node, _FUNCTIONS))


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def python_tests(file: str) -> tuple[str, ...]:
    """Returns the tests that must kill the mutants of a file: the tests of its op or of its folder."""
    path = Path(file)
    folder = ROOT / "tests" / path.parent.name
    own = folder / f"test_{path.stem}.py"
    cost = ROOT / "tests/models/test_cost.py"
    if path.parent.name == "ops" and own.exists():
        flops = "register_flop_formula" in (ROOT / file).read_text()
        return (str(own), str(cost)) if flops else (str(own),)
    tests = sorted(test for test in folder.glob("test_*.py") if test.stem not in NOT_RUN)
    return tuple(map(str, [*tests, cost, ROOT / "tests/checkpoints/test_old_files.py"]))


def run_python(mutants: Sequence[Mutant], report: Callable[[Mutant, str], None], slow: bool) -> None:
    """Runs the mutants, file by file for each set of tests."""
    import torch._dynamo  # noqa: F401  (once, before the forks)

    groups: dict[tuple[str, ...], list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault(python_tests(mutant.file), []).append(mutant)
    for tests, group in groups.items():
        names = [] if slow else ["-k", f"not ({SLOW})"]
        options = ["-o", "addopts=", "-s", "-p", "no:cacheprovider", "-p", "no:terminal", *names, *tests]
        if pytest.main(options, [Forks(group, report)]):
            raise SystemExit(1)


class Forks:
    """Plugin of pytest that collects the tests once, and runs tests that reach a mutant in a fork for each mutant.

    A mutated function gets the code of the mutant, so the change reaches all modules that imported the function.

    Args:
        mutants: Mutants to run.
        report: Takes every mutant with its result.
    """

    def __init__(self, mutants: Sequence[Mutant], report: Callable[[Mutant, str], None]):
        self.mutants = mutants
        self.report = report

    def pytest_runtestloop(self, session: Any) -> bool:
        """Runs the mutants in place of the tests."""
        gc.unfreeze()
        functions = [f for f in gc.get_objects() if type(f) is FunctionType]
        functions = [f for f in functions if f.__code__.co_filename.startswith(f"{ROOT}/vmoe_routers/")]
        gc.collect()
        gc.freeze()  # a collection in a fork would copy all of memory
        reached = self._measure(session)
        for mutant in self.mutants:
            changed = _changed_code(mutant)
            *_, innermost = changed or [None]
            if innermost is None or any(old.co_freevars != new.co_freevars for old, new in changed.items()):
                self.report(mutant, "not compiled")  # the same code, or a closure that loses a variable
                continue
            place = (str(ROOT / mutant.file), innermost.co_firstlineno)
            tests = sorted((seconds, number) for number, (seconds, places) in reached.items() if place in places)
            if not tests:
                self.report(mutant, "not reached")
                continue
            child = os.fork()
            if child == 0:
                try:
                    _silence()
                    _limit(3 * sum(seconds for seconds, _ in tests) + 5)
                    for function in functions:
                        if function.__code__ in changed:
                            function.__code__ = changed[function.__code__]
                    self._run(session, [number for _, number in tests])
                finally:
                    os._exit(bool(session.testsfailed))
            self.report(mutant, "killed" if os.waitpid(child, 0)[1] else "survived")
        return True

    def _run(self, session: Any, numbers: Sequence[int]) -> None:
        """Runs tests until one fails."""
        items = [session.items[number] for number in numbers]
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return

    def _measure(self, session: Any) -> dict[int, tuple[float, set[tuple[str, int]]]]:
        """Runs every test without a mutant; returns its processor time and the functions that it calls."""
        read, write = os.pipe()
        child = os.fork()
        if child:
            os.close(write)
            with os.fdopen(read, "rb") as stream:
                text = stream.read()
            os.waitpid(child, 0)
            found = pickle.loads(text)
            if isinstance(found, str):
                raise pytest.UsageError(f"{found} fails without a mutant")
            return found
        _silence()
        found = {}
        for number in range(len(session.items)):
            places: set[tuple[str, int]] = set()

            def note(frame: Any, event: str, _: object, places: set[tuple[str, int]] = places) -> None:
                if event == "call" and "/vmoe_routers/" in frame.f_code.co_filename:
                    places.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

            start = time.process_time()
            threading.setprofile(note)
            sys.setprofile(note)
            self._run(session, [number])
            sys.setprofile(None)
            threading.setprofile(None)  # type: ignore[arg-type]
            found[number] = time.process_time() - start, places
            if session.testsfailed:
                found = session.items[number].nodeid
                break
        with os.fdopen(write, "wb") as stream:
            pickle.dump(found, stream)
        os._exit(0)


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)


def _changed_code(mutant: Mutant) -> dict[CodeType, CodeType]:
    """Pairs every function's code that the mutant changes with the new code, from the outermost to the innermost."""
    file = str(ROOT / mutant.file)
    changed = {}

    def compare(old: CodeType, new: CodeType) -> None:
        if old == new:
            return
        changed[old] = new
        inner = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (old, new)]
        if len(inner[0]) == len(inner[1]):
            for pair in zip(*inner, strict=True):
                compare(*pair)

    module = Path(file).read_text()
    compare(compile(module, file, "exec", dont_inherit=True), compile(mutant.source, file, "exec", dont_inherit=True))
    return changed


def _limit(seconds: float) -> None:
    """Limits this process: processor time, memory, and elapsed time, which is longer on a busy machine."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.alarm(int(20 * seconds) + 1)


# Mutants of C++.

_TOKENS = {" < ": " <= ", " <= ": " < ", " > ": " >= ", " >= ": " > ", " == ": " != ", " != ": " == "}
_TOKENS |= {" && ": " || ", " || ": " && ", " + ": " - ", " - ": " + ", " * ": " / ", " / ": " * ", " % ": " / "}
_TOKENS |= {" += ": " -= ", " -= ": " += ", "std::min": "std::max", "std::max": "std::min", "true": "false"}
_TOKENS |= {"false": "true", "!(": "("}
_TOKEN = re.compile("|".join(re.escape(token) for token in sorted(_TOKENS, key=len, reverse=True)))
_NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.])")
_STATEMENT = re.compile(r"^\s*(?:[\w.\[\]>()*+ -]*\S [-+*|&]?= .*|[\w.:<>]+\(.*\)|continue|break);$")
_DECLARATION = re.compile(r"^\s*(?:const|constexpr|auto|return|\w+(?:<.*>)? \w+ =)\b")
_SKIPPED = re.compile(r"^\s*(?:#|//|template|static_assert|using|namespace|VMOE_)")


def cpp_files() -> list[str]:
    """Lists the files that are mutated."""
    return [f"csrc/cpu/{kernel}.cpp" for kernel in KERNELS]


def cpp_mutants(file: str) -> list[Mutant]:
    """Lists all mutants of a C++ file. Some do not compile."""
    lines = (ROOT / file).read_text().splitlines(keepends=True)
    mutants = []
    macro = False
    for number, line in enumerate(lines):
        skipped, macro = macro or _SKIPPED.match(line), line.endswith("\\\n")
        if skipped or re.match(r"^\s+(?:const )?\w+[*,]", line):  # parameters and types alone
            continue
        code = line.partition("//")[0]
        new = [(m.start(), m.end(), _TOKENS[m[0]]) for m in _TOKEN.finditer(code)]
        new += [(m.start(), m.end(), str(int(m[0]) + 1)) for m in _NUMBER.finditer(code)]
        statement = code.rstrip()
        if _STATEMENT.match(statement) and not _DECLARATION.match(statement):
            indent = len(statement) - len(statement.lstrip())
            new.append((indent, len(statement), ";"))
        for begin, end, text in new:
            changed = line[:begin] + text + line[end:]
            source = "".join([*lines[:number], changed, *lines[number + 1 :]])
            mutants.append(Mutant(file, number + 1, line.strip(), changed.strip(), source))
    return mutants


def run_cpp(mutants: Sequence[Mutant], report: Callable[[Mutant, str], None]) -> None:
    """Builds the GoogleTest of every kernel alone, then compiles, links and runs its mutants."""
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(BUILD / "csrc", ignore_errors=True)
    shutil.copytree(ROOT / "csrc", BUILD / "csrc")
    for file in dict.fromkeys(mutant.file for mutant in mutants):
        test = CppTest(Path(file).stem)
        start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        if test.passes(600) is not True:
            raise SystemExit(f"{file}: a test fails without a mutant")
        seconds = 2 * (resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start) + 1
        for mutant in mutants:
            if mutant.file == file:
                (BUILD / file).write_text(mutant.source)
                passed = test.passes(seconds)
                report(mutant, "not compiled" if passed is None else "survived" if passed else "killed")
        shutil.copy(ROOT / file, BUILD / file)


class CppTest:
    """GoogleTest of one kernel, which is compiled from the copy of csrc.

    Args:
        kernel: Name of the kernel.
    """

    def __init__(self, kernel: str):
        kept = f"CMakeFiles/core_{ISA}.dir/csrc/cpu/{kernel}.cpp.o"
        compile_words = [word.replace(f"{ROOT}/csrc", f"{BUILD}/csrc") for word in _ninja(kept)]
        compile_words[compile_words.index("-o") + 1] = "mutant.o"
        self.compile = [*compile_words, "-w"]
        parts = ("/core_", "/simd_probe", "/isa.cpp.o", "/main.cpp.o", f"/{kernel}_test.cpp.o")
        words = [word for word in _ninja("tests/cpp/cpp_tests") if word not in (":", "&&")]
        words = [word for word in words if not word.endswith(".o") or any(part in word for part in parts)]
        objects = [word for word in words if word.endswith(".o") and word != kept]
        subprocess.run(["ninja", "-C", BUILD, *objects], check=True, stdout=subprocess.DEVNULL)
        self.link = ["mutant.o" if word == kept else word for word in words]
        self.link[self.link.index("-o") + 1] = "mutant_tests"

    def passes(self, seconds: float) -> bool | None:
        """Tells whether the tests pass; None if the kernel does not compile."""
        silent: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        if subprocess.run(self.compile, cwd=BUILD, **silent).returncode:
            return None
        subprocess.run(self.link, cwd=BUILD, check=True)
        options = [f"--isa={ISA}", "--gtest_brief=1", "--gtest_fail_fast"]
        done = subprocess.run([BUILD / "mutant_tests", *options], preexec_fn=lambda: _limit(seconds), **silent)
        return done.returncode == 0


def _ninja(target: str) -> list[str]:
    """Returns the words of the command by which ninja makes a target."""
    command = ["ninja", "-C", BUILD, "-t", "commands", "-s", target]
    return shlex.split(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


# Both languages.


def read(path: Path) -> list[dict[str, str]]:
    """Reads the kept rows."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """Writes the rows, sorted by file and line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["file"], int(row["line"]), row["after"])))


def score(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """Yields the score of every file, and of all: killed mutants, explained survivors and open survivors."""
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if row["result"] != "not compiled":
            result = row["result"] if row["result"] == "killed" else "explained" if row["why"] else "open"
            for name in (row["file"], "all"):
                counts.setdefault(name, Counter())[result] += 1
    for name in sorted(counts, key=lambda name: (name == "all", name)):
        count = counts[name]
        share = count["killed"] / count.total()
        yield f"{name:40} {count['killed']} of {count.total()} killed ({share:.0%}), {count['explained']} explained"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=("python", "cpp"))
    parser.add_argument("--count", type=int, default=20, help="mutants per file")
    parser.add_argument("--files", nargs="+", metavar="FILE", help="only these files")
    parser.add_argument("--slow", action="store_true", help="Python: also the tests that compile or export")
    parser.add_argument("--survivors", action="store_true", help="only mutants that survived the last time")
    parser.add_argument("--report", action="store_true", help="run nothing, print the score of the kept rows")
    options = parser.parse_args()
    os.chdir(ROOT)
    path = ROOT / "tests" / "mutants" / f"{options.language}.csv"
    kept = {(row["file"], row["before"], row["after"]): row for row in read(path)}
    if options.report:
        print(*score(kept.values()), sep="\n")
        return
    find = python_mutants if options.language == "python" else cpp_mutants
    chosen = []
    for file in options.files or (python_files() if options.language == "python" else cpp_files()):
        mutants = {(file, mutant.before, mutant.after): mutant for mutant in find(file)}
        if options.survivors:
            chosen += [mutants[key] for key in kept if key in mutants and kept[key]["result"] in SURVIVED]
            continue
        sample = dict(sorted(mutants.items(), key=lambda pair: pair[1].rank())[: options.count])
        kept = {key: row for key, row in kept.items() if key[0] != file or key in sample}
        chosen += sample.values()
    console = os.fdopen(os.dup(1), "w")  # tests print nothing

    def report(mutant: Mutant, result: str) -> None:
        key = (mutant.file, mutant.before, mutant.after)
        why = kept[key]["why"] if result in SURVIVED and key in kept else ""
        values = (mutant.file, str(mutant.line), mutant.before, mutant.after, result, str(datetime.date.today()), why)
        kept[key] = dict(zip(COLUMNS, values, strict=True))
        write(path, kept.values())
        print(f"{result:12} {mutant.file}:{mutant.line}: {mutant.after}", file=console, flush=True)

    if options.language == "python":
        run_python(chosen, report, options.slow)
    else:
        run_cpp(chosen, report)
    print(*score(kept.values()), sep="\n", file=console)


if __name__ == "__main__":
    main()
