"""scripts/mutate.py: the mutants that it makes, and the kept results, whose survivors are explained."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("scripts/mutate.py needs Python 3.11", allow_module_level=True)

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("mutate", ROOT / "scripts" / "mutate.py")
assert spec and spec.loader
mutate = importlib.util.module_from_spec(spec)
sys.modules["mutate"] = mutate
spec.loader.exec_module(mutate)

PYTHON = '''"""Docstring with 3 + 4."""
LIMIT = 5


def outer(a: int, b: int = 7) -> int:
    """Adds 1."""
    def inner(c):
        return c + (
            2 * a
        )
    check(a)
    if a < b:
        raise ValueError(f"{a + b} is wrong")
    return inner(b)
'''
CPP = """#include <algorithm>
constexpr int kRows = 64;
template <typename T>
void add(const T* x, T* y, int n) {  // n + 1
  for (int i = 0; i < n; ++i) {
    const int at = std::min(i, kRows);
    y[at] += x[i];
  }
}
"""


@pytest.fixture
def mutants(tmp_path, monkeypatch):
    """Writes a file and returns its mutants: the line, before, after."""
    monkeypatch.setattr(mutate, "ROOT", tmp_path)

    def find(name, text):
        (tmp_path / name).write_text(text)
        return (mutate.python_mutants if name.endswith(".py") else mutate.cpp_mutants)(name)

    return find


def test_mutants_of_python(mutants):
    found = mutants("a.py", PYTHON)
    assert [(mutant.line, mutant.after) for mutant in found] == [
        (8, "return (c - 2 * a )"),
        (9, "(2 / a)"),
        (9, "3 * a"),
        (11, "pass"),
        (12, "if (not (a < b)):"),
        (12, "if (a <= b):"),
        (13, "pass"),
    ]
    for mutant in found:
        assert len(mutant.source.splitlines()) == len(PYTHON.splitlines()), "later lines keep their numbers"
        compile(mutant.source, "a.py", "exec")
    assert len({mutant.rank() for mutant in found}) == len(found)


def test_a_function_gets_the_code_of_a_mutant(mutants):
    before = next(mutant for mutant in mutants("a.py", PYTHON) if mutant.after == "3 * a")
    names = {"check": lambda a: None}
    exec(compile(PYTHON, "a.py", "exec", dont_inherit=True), names)
    changed = mutate._changed_code(before)
    assert names["outer"](9, 4) == 22 and len(changed) == 3
    names["outer"].__code__ = changed[names["outer"].__code__]
    assert names["outer"](9, 4) == 31


def test_mutants_of_cpp(mutants):
    found = [(mutant.line, mutant.after) for mutant in mutants("a.cpp", CPP)]
    assert found == [
        (2, "constexpr int kRows = 65;"),
        (5, "for (int i = 0; i <= n; ++i) {"),
        (5, "for (int i = 1; i < n; ++i) {"),
        (6, "const int at = std::max(i, kRows);"),
        (7, "y[at] -= x[i];"),
        (7, ";"),
    ]


@pytest.mark.parametrize("language", ["python", "cpp"])
def test_every_kept_survivor_is_explained(language):
    rows = mutate.read(ROOT / "tests" / "mutants" / f"{language}.csv")
    assert len(rows) > 30
    for row in rows:
        assert row["result"] in ("killed", "survived", "not reached", "not compiled")
        assert bool(row["why"]) == (row["result"] in mutate.SURVIVED), row
    *_, total = mutate.score(rows)
    words = total.removeprefix("all").strip()
    assert words in " ".join((ROOT / "CONTRIBUTING.md").read_text().split()), "CONTRIBUTING has the score"
