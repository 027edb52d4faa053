"""scripts/check_prose.py finds every kind of fault, and finds nothing in text without faults."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "check_prose.py"
FAULTS = {
    "fault.py": [
        '"""Of a module."""',
        "# Of the rows",
        "x = 1  # nobody reads it",
        "def f():\n    '''First.\n\n    A line that stands for another.'''",
        "# rubbish",
        "# on a CPU of AMD's",
    ],
    "fault.cu": ["// Of a group.", "int x;  // a warp a token", "// " + "x" * 98, "int y;  // one block a row"],
    "fault.cuh": ["// Rows that are one behind another"],
    "fault.sh": ["#!/bin/sh\n# Of a file", "# The tokens are not there"],
    "CMakeLists.txt": ["set(a b)\n  # It goes to and fro.", "# " + "x" * 119],
    "fault.md": ["- Of the rows", "Lengths of nobody."],
}
FINE = {
    "fine.py": ["# Takes the rows\n# Of them, this line goes on with the sentence.", 'x = "nobody"', "# of the rows"],
    "fine.cpp": ['const char* url = "https://Of.nobody";', "int x;  // one warp per token", "// " + "x" * 97],
    "fine.sh": ['echo "a # Of b"', "x" * 130, "# " + "x" * 118],
    "fine.md": ["```\n# Of code\n```", "Of course."],
}


def check(path: Path, text: str) -> list[int]:
    path.write_text(text + "\n")
    return [number for number, _ in runpy.run_path(str(SCRIPT))["violations"](path)]


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FAULTS.items() for text in texts])
def test_faults(tmp_path, name, text):
    assert check(tmp_path / name, text) == [len(text.splitlines())]


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FINE.items() for text in texts])
def test_fine(tmp_path, name, text):
    assert check(tmp_path / name, text) == []


def test_exit_status(tmp_path):
    (tmp_path / "a.py").write_text("# Of a file\n")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path / "a.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.startswith(f"{tmp_path / 'a.py'}:1: ")
